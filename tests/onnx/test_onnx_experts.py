"""Mixtures of experts in a graph: every form of router and activation beside the torch reader, and which operator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmkit.architecture.experts import ClampedSwiGLU
from llmkit.architecture.hooks import reader_of
from llmkit.architecture.registry import default_registry
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.gated import _PRODUCTS
from llmkit.decoder.load import load_decoder
from llmkit.onnx.contract import decoder_of, initializer_bytes
from llmkit.onnx.model import build_graph
from llmkit.onnx.parity import compare_decoders
from llmkit.onnx.precision import Precision
from llmkit.onnx.quantized_weights import choose_grids, restored
from llmkit.tensors.spec import DType

_MIXTRAL = default_registry().load(next(p for p in default_registry().plugins if p.name == "mixtral"))
_GROUPS = {"groups": 2, "top_groups": 1}


def made(router, mlp):
    """A tiny model whose experts are of that form."""
    kind = replace(_MIXTRAL.block.mlp, **mlp)
    kind = replace(kind, router=replace(kind.router, **router))
    names = {**_MIXTRAL.names.slots, "mlp.shared": "shared", "mlp.shared_gate": "shared_gate"}
    names["mlp.router.correction"] = "correction"
    return replace(
        _MIXTRAL,
        block=replace(_MIXTRAL.block, mlp=kind),
        names=replace(_MIXTRAL.names, slots=names),
        tiny={**_MIXTRAL.tiny, "num_hidden_layers": 1},
    )


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize(
    ("operator", "router", "mlp"),
    [
        ("MoE", {"is_normalized": False}, {}),
        ("MoE", {"scores": "chosen_softmax", "scale": 2.5, "bias": True}, {"act": ClampedSwiGLU(limit=0.5)}),
        ("MoE", {"is_normalized": False, "scale": 2.5, **_GROUPS}, {"bias": True}),
        ("MoE", {"scores": "sigmoid", "correction": True, "epsilon": 0.1, "group_score": "top2", **_GROUPS}, {}),
        ("MoE", {"scores": "sigmoid", "top_k": 1, "is_normalized": False}, {"weighs": "input"}),
        ("MoE", {}, {"shared": "ffn", "shared_gate": True}),
        ("Loop", {}, {"act": "gelu", "bias": True}),
        ("Loop", {"scores": "sigmoid"}, {"act": ClampedSwiGLU(limit=0.5), "weighs": "input"}),
    ],
)
def test_every_form_is_computed(operator, router, mlp):
    family = made(router, mlp)
    config = family.tiny_config()
    ckpt, model = random_checkpoint(family, config), family.bind(config)
    graph = build_graph(model, ckpt.tensors, initializer_bytes)
    assert operator in {node.op_type for node in graph.graph.node}
    wanted = load_decoder(ckpt, architecture=family)
    assert max(d.largest for d in compare_decoders(decoder_of(graph, model), wanted)) < 1e-5


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize(
    ("operator", "bits", "symmetric", "router", "mlp"),
    [
        ("QMoE", 4, True, {}, {}),
        ("QMoE", 4, False, {"is_normalized": False}, {"bias": True}),  # its kernel normalises what it is told not to
        ("MoE", 8, None, {}, {}),
        ("Loop", 4, None, {}, {"act": "gelu"}),
    ],
)
def test_experts_on_grids(operator, bits, symmetric, router, mlp):
    family = made(router, mlp)
    config = {**family.tiny_config(), "intermediate_size": 48}
    ckpt, model = random_checkpoint(family, config), family.bind(config)
    precision = Precision(bits=bits, symmetric=symmetric, group_size=16)
    grids, _ = choose_grids(ckpt, model, precision, scale_dtype=DType.F32, provider="cpu")
    assert any(".experts." in name for name in grids.matrices) == (bits == 4)
    graph = build_graph(model, ckpt.tensors, initializer_bytes, grids=replace(grids, accuracy_level=0))
    assert operator in {node.op_type for node in graph.graph.node}
    wanted = load_decoder(ckpt.derive(tensors=restored(ckpt.tensors, model, grids)), architecture=family)
    assert max(d.largest for d in compare_decoders(decoder_of(graph, model), wanted)) < 1e-5


@pytest.mark.filterwarnings("ignore:config.json")
def test_int8_activations_of_experts_stay_near():
    """Every expert is chosen, so that rounding cannot send a token to another one."""
    family = made({"top_k": _MIXTRAL.tiny["num_local_experts"]}, {})
    config = {**family.tiny_config(), "intermediate_size": 48}
    ckpt, model = random_checkpoint(family, config), family.bind(config)
    grids, _ = choose_grids(ckpt, model, Precision(bits=4, group_size=16), scale_dtype=DType.F32, provider="cpu")
    graph = build_graph(model, ckpt.tensors, initializer_bytes, grids=grids)
    wanted = load_decoder(ckpt.derive(tensors=restored(ckpt.tensors, model, grids)), architecture=family)
    worst = [d.largest for d in compare_decoders(decoder_of(graph, model), wanted)]
    assert all(1e-4 < x < 0.15 for x in worst), worst


def test_the_clamped_activation_is_the_one_of_transformers():
    """Beyond the limit too, which no random model reaches."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=1, intermediate_size=64, num_local_experts=1)
    theirs = GptOssExperts(config)
    if not hasattr(theirs, "_apply_gate"):
        pytest.skip("this transformers has the activation within a longer function")
    gate, up = torch.linspace(-20, 20, 64), torch.linspace(15, -15, 64).roll(9)
    expected = theirs._apply_gate(torch.stack([gate, up], -1).flatten())
    product = reader_of(ClampedSwiGLU(), _PRODUCTS)()
    assert torch.allclose(product(gate, up), expected, atol=1e-6)
