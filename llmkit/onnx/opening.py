"""Opening an exported folder with ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llmkit.architecture import registry
from llmkit.errors import InputError, RequirementError, require_choice
from llmkit.formats.json_text import read_object
from llmkit.formats.onnx_graph import read_graph
from llmkit.layouts.onnx_folder import MODEL, ORIGINAL_CONFIG
from llmkit.lazy_imports import onnx, torch
from llmkit.onnx.binding import reason
from llmkit.onnx.model import ACCURACY
from llmkit.onnx.parts import Parts
from llmkit.onnx.session import OrtDecoder

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CONFIGS = (ORIGINAL_CONFIG, "config.json")


def is_onnx_folder(path: Path) -> bool:
    """Whether a folder holds a model that `llmkit export` wrote."""
    return path.is_dir() and (path / MODEL).is_file()


def original_config(folder: Path) -> dict[str, Any]:
    """The config that the model was published with; config.json may be one that Optimum understands.

    Raises:
        InputError: there is none, or it is no object.
    """
    name = next((name for name in _CONFIGS if (folder / name).is_file()), None)
    if name is None:
        raise InputError(
            f"{folder} has no config.json, which says what model it is",
            hint="copy the config.json of the model that it was exported from into it, or export the model again",
        )
    return read_object(folder / name)


def load_onnx(folder: Path, *, provider: str = "cpu", threads: int | None = None, exact: bool = False) -> OrtDecoder:
    """The decoder of an exported folder.

    Args:
        folder: what `llmkit export` wrote.
        provider: cpu or cuda.
        threads: for one operator; ONNX Runtime's choice where not given.
        exact: products with integers are computed in the compute dtype, whatever accuracy level the graph states.

    Raises:
        InputError: no such folder, an unknown provider, or no graph. Sessions are opened at the first call: what ONNX
            Runtime cannot load (weights that are cut short) is told there.
        RequirementError: ONNX Runtime is not installed, or has no such provider.
    """
    check_provider(provider)
    if not is_onnx_folder(folder):
        raise InputError(f"{folder} holds no {MODEL}", hint="llmkit export MODEL --to onnx -o OUT writes one")
    graph = read_graph(folder / MODEL)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    is_ours = "llmkit.state" in metadata
    if not is_ours:
        _refuse_right_padding(folder / MODEL, graph)
    config = original_config(folder)
    if exact:
        _make_exact(graph)
    model = registry.require_model(config, folder.name) if is_ours else None
    options = partial(_options, folder, threads, "0" if exact else metadata.get(ACCURACY, "4"))
    model_or_path = graph.SerializeToString() if exact else str(folder / MODEL)
    parts = Parts(graph, lambda part: _session(folder, part or model_or_path, provider, options()), _device(provider))
    return OrtDecoder(parts, model, provider=provider, context=_context(config))


def check_provider(provider: str) -> None:
    """Refuse a provider that is unknown, or that the installed ONNX Runtime does not have.

    Raises:
        InputError: it is unknown.
        RequirementError: ONNX Runtime is not installed, or has not got it.
    """
    require_choice("--provider", provider, PROVIDERS, "--provider cpu")
    try:
        import onnxruntime
    except ImportError as error:
        raise RequirementError(
            "ONNX Runtime is not installed", hint="pip install 'llmkit[cpu]' (or llmkit[gpu]; never both)"
        ) from error
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        available = ", ".join(onnxruntime.get_available_providers())
        raise RequirementError(
            f"this ONNX Runtime has no provider {provider!r}; it has {available}",
            hint="pip uninstall onnxruntime && pip install 'llmkit[gpu]' on a machine with a GPU, or --provider cpu",
        )


def _refuse_right_padding(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse a graph of another program that takes padding on the right only: this runner pads on the left, too."""
    if any(node.op_type == "GroupQueryAttention" for node in proto.graph.node):
        raise InputError(
            f"{path} was written by {proto.producer_name or 'another program'}: its attention takes no padding on the "
            "left, which this runner needs",
            hint="llmkit export MODEL --to onnx -o OUT writes one that runs here and in onnxruntime-genai",
        )


def _make_exact(graph: onnx.ModelProto) -> None:
    nodes = (node for node in graph.graph.node if node.op_type in ("MatMulNBits", "QMoE"))
    for attribute in (a for node in nodes for a in node.attribute if a.name == "accuracy_level"):
        attribute.i = 0


def _device(provider: str) -> torch.device:
    """Where tensors lie: on the GPU where torch knows it, too."""
    return torch.device("cuda" if provider == "cuda" and torch.cuda.is_available() else "cpu")


def _options(folder: Path, threads: int | None, level: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads wait awake between the operators of a run, which are short, and sleep between runs: else they take the
    # cores from the other half and from torch. Where others use the cores they sleep at once: a step of SmolLM2 in int4
    # took 7 ms awake and 9 asleep on two free cores, 25 and 13 on two busy ones.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(_are_cores_free())))
    # Where external data lies, for a model that comes as bytes.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.absolute()))
    # What DequantizeLinear and MatMul become: the graph cannot say it of them.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    return options


def _session(folder: Path, source: bytes | str, provider: str, options: Any) -> Any:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(source, options, providers=[PROVIDERS[provider]])
    except Exception as error:
        raise InputError(
            f"ONNX Runtime cannot load {folder / MODEL}: {reason(error)}",
            hint=f"llmkit verify {folder} finds damaged files",
        ) from error
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise RequirementError(
            f"ONNX Runtime has the provider {provider!r}, but could not start it; it fell back to "
            f"{session.get_providers()[0]}",
            hint="see that the driver and the CUDA libraries are those that this onnxruntime-gpu wants",
        )
    return session


def _are_cores_free() -> bool:
    """Whether no more threads ran over the last minute than one program like this has, and half as many; true where
    the system does not tell."""
    try:
        return os.getloadavg()[0] < 1.5 * (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return True


def _context(config: Mapping[str, Any]) -> int | None:
    context = next((config[k] for k in ("max_position_embeddings", "n_positions", "n_ctx") if k in config), None)
    return context if isinstance(context, int) else None
