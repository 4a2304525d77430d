"""The ONNX part of the contract of an architecture plugin: graphs of its tiny models against their torch decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.model import Model
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.decoder.contract import Check, random_checkpoint, run_clause
from llmkit.decoder.load import load_decoder
from llmkit.errors import RequirementError
from llmkit.lazy_imports import onnx, torch
from llmkit.onnx.context import AttentionOp
from llmkit.onnx.model import build_graph, first_graph
from llmkit.onnx.parity import N_STEPS, compare_decoders
from llmkit.onnx.parts import Parts
from llmkit.onnx.session import OrtDecoder
from llmkit.pipeline.pool import torch_threads
from llmkit.tensors.lazy import Lazy

_OPS: tuple[AttentionOp, ...] = ("gqa", "attention")


def check_graphs(architecture: Architecture) -> list[Check]:
    """Logits of prefill, cached steps and a left-padded batch, for the tiny model and each of its variants.

    A model that the graph reader cannot express is no fault of the plugin: its clause has a note.
    """
    if find_spec("onnxruntime") is None:
        return [Check("ONNX logits", note="not computed: ONNX Runtime is not installed (llmkit[cpu])")]
    return [
        replace(check_graph(architecture, architecture.tiny_config(variant)), name=f"{variant or 'tiny'}: ONNX logits")
        for variant in (None, *architecture.variants)
    ]


def check_graph(architecture: Architecture, config: Mapping[str, Any]) -> Check:
    """The same for random weights of one config."""
    missing: list[str] = []

    def compute() -> float | None:
        ckpt, model = random_checkpoint(architecture, config), architecture.bind(config)
        try:
            _, graph = first_graph(_OPS, lambda op: build_graph(model, ckpt.tensors, initializer_bytes, attention=op))
        except RequirementError as error:
            missing.append(f"none: {error.message}")
            return None
        return _largest(decoder_of(graph, model), ckpt, architecture)

    with torch_threads(1):
        check = run_clause("ONNX logits", compute)
    return replace(check, note=missing[0]) if missing else check


def _largest(exported: OrtDecoder, ckpt: Checkpoint, architecture: Architecture) -> float:
    wanted = load_decoder(ckpt, architecture=architecture)
    differences = compare_decoders(exported, wanted, suffix=architecture.prompt_suffix_of(ckpt.config))
    # Beyond a length that changes the rotation of earlier keys no cache is exact: such steps are not one computation.
    limit = wanted.exact_sharing_limit
    is_short = limit is not None and limit < N_STEPS
    return max(d.largest for d in differences if not (is_short and d.case == "cached steps"))


def initializer_bytes(name: str, lazy: Lazy) -> bytes:
    """The data of an initializer that lies in the graph itself."""
    return bytes(lazy.load().numpy().tobytes())


def decoder_of(graph: onnx.ModelProto, model: Model | None = None) -> OrtDecoder:
    """The decoder of a graph that holds its weights, on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    # What DequantizeLinear and MatMul become; the default would be int8 activations.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    serialized = graph.SerializeToString()
    parts = Parts(graph, lambda part: onnxruntime.InferenceSession(part or serialized, options), torch.device("cpu"))
    return OrtDecoder(parts, model)
