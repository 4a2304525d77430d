"""Every family on integer grids, against its torch decoder with the floats that the integers stand for."""

from __future__ import annotations

import pytest
import torch

from llmkit.architecture.experts import Experts
from llmkit.errors import InputError, SpecError
from llmkit.onnx.parity import compare_decoders
from llmkit.onnx.precision import Precision

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
from rotation import EVERY_WAY, rotated
from tiny_graphs import CASES, PLUGINS, made_on_grids

# Groups of 32 do not divide every row of the tiny models: the last block of a row is filled up then. No search
# for scales, which takes most of the time and which graphs do not depend on: other tests here have that default.
WAYS = {
    "int4": Precision(4, 32, symmetric=True, method="rtn"),
    "int4 asymmetric": Precision(4, 16, method="rtn"),
    "int8 by row": Precision(8, "channel", method="rtn"),
    "int8 asymmetric": Precision(8, "auto", symmetric=False, method="rtn"),
}


def worst_of(name, precision, **options):
    found, wanted, ends = made_on_grids(name, precision, **options)
    return {d.case: d.largest for d in compare_decoders(found, wanted, suffix=ends)}, found


def with_level(precision, level, **changes):
    from dataclasses import replace

    return replace(precision, accuracy_level=level, **changes)


@pytest.mark.parametrize(("name", "way"), rotated(PLUGINS, list(WAYS)))
def test_logits(name, way):
    worst, _ = worst_of(name, with_level(WAYS[way], 0))
    assert all(x <= 1e-5 for x in worst.values()), worst


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bloom", "phi3", "chatglm"])
def test_the_standards_operators(name, bits):
    """DequantizeLinear and MatMul: with biases, fused matrices and those that are stored the other way round."""
    worst, found = worst_of(name, Precision(bits, 16, accuracy_level=0, is_qdq=True))
    assert any(node.op_type == "DequantizeLinear" for node in found.parts._graph.graph.node)
    assert all(x <= 1e-5 for x in worst.values()), worst


@pytest.mark.parametrize("name", sorted(EVERY_WAY))
def test_int8_activations_stay_near(name):
    worst, _ = worst_of(name, with_level(WAYS["int4"], 4))
    blocks = PLUGINS[name].bind(PLUGINS[name].tiny_config()).blocks
    # A token that rounding sends to another expert is another number: test_onnx_experts.py has one without a choice.
    most = 1.0 if any(isinstance(getattr(block, "mlp", None), Experts) for block in blocks) else 0.15
    assert all(1e-4 < x <= most for x in worst.values()), worst  # below: the level would not have been applied


@pytest.mark.parametrize(
    ("name", "variant"),
    [("llama", None), ("llama", "tied"), ("bloom", None), ("gpt2", None), ("gpt2", "untied"), ("opt", "350m"),
     ("gemma2", None), ("chatglm", None), ("baichuan", "baichuan2-7b")],
)  # fmt: skip
@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_and_head(name, variant, bits):
    precision = Precision(bits, 16, symmetric=bits == 4, embedding_bits=12 - bits, accuracy_level=0)
    worst, _ = worst_of(name, precision, variant=variant)
    assert all(x <= 1e-5 for x in worst.values()), worst


def test_float16_with_integers():
    worst, found = worst_of("llama", Precision(4, 32, embedding_bits=4, accuracy_level=0), dtype="FLOAT16")
    assert all(x <= 2e-2 for x in worst.values()), worst
    assert found.parts.body.session.get_inputs()[-1].type == "tensor(float16)"


def nodes(name, precision, variant=None):
    """Types of a graph's nodes, and sizes of its initializers, whose values nobody looks at: they are zeros."""
    import onnx_ir

    from llmkit.decoder.contract import random_checkpoint
    from llmkit.onnx.model import build_graph
    from llmkit.onnx.quantized_weights import choose_grids
    from llmkit.tensors.spec import DType

    architecture = PLUGINS[name]
    config = architecture.tiny_config(variant)
    ckpt, model = random_checkpoint(architecture, config), architecture.bind(config)
    grids, notes = choose_grids(ckpt, model, precision, scale_dtype=DType.F32, provider="cpu")
    made = build_graph(
        model, ckpt.tensors, lambda name, lazy: bytes(lazy.spec.nbytes), attention="attention", grids=grids
    )
    graph = onnx_ir.serde.deserialize_model(made).graph
    return list(graph), {n: v.const_value.nbytes for n, v in graph.initializers.items()}, notes


def test_tied_embedding_and_head_share_their_bytes():
    found, sizes, _ = nodes("llama", Precision(4, 16), "tied")
    kinds = [n.op_type for n in found]
    assert kinds.count("GatherBlockQuantized") == 1
    assert "FusedMatMul" not in kinds
    tables = [n for n in sizes if "embed" in n or "head" in n]
    assert sorted(tables) == [f"model.embed_tokens.weight_{part}" for part in ("codes", "scales", "zeros")]
    head = next(n for n in found if n.op_type == "MatMulNBits" and n.name.startswith("/head"))
    assert head.inputs[1].producer().op_type == "Reshape"
    assert head.inputs[1].producer().inputs[0].name == "model.embed_tokens.weight_codes"


def test_fused_projections_stay_one_product_and_take_their_bias_along():
    found, _, _ = nodes("gpt2", Precision(4, 32))
    first = [n for n in found if n.op_type == "MatMulNBits" and n.name.startswith("/layers.0")]
    assert len(first) == 4  # qkv, o, up, down
    assert all(n.inputs[5] is not None and n.inputs[5].name.endswith("bias") for n in first)
    assert not [n for n in found if n.op_type == "MatMul"]  # nothing transposed is left


def test_embedding_and_head_have_bits_of_their_own():
    """Eight by default; floats where that is asked for, or where every product in 8 bits would restore the matrix."""

    def bits_of(precision):
        found, sizes, notes = nodes("llama", precision)
        grids = {n.inputs[1].name: n for n in found if n.op_type == "MatMulNBits"}
        grids |= {n.inputs[0].name: n for n in found if n.op_type == "GatherBlockQuantized"}
        ends = ("model.embed_tokens.weight", "lm_head.weight")
        found = {name: grids[f"{name}_codes"].attributes["bits"].value for name in ends if f"{name}_codes" in grids}
        assert all((name in sizes) != (name in found) for name in ends)
        return list(found.values()), " ".join(notes)

    assert bits_of(Precision(4, 32))[0] == [8, 8]
    assert bits_of(Precision(8, 32))[0] == [8, 8]
    bits, notes = bits_of(Precision(4, 32, embedding_bits=4))
    assert bits == [4, 4]
    assert "lm_head.weight to int4 group 32 asymmetric" in notes
    bits, notes = bits_of(Precision(4, 32, embedding_bits=16))
    assert bits == []
    assert "left in floats: model.embed_tokens.weight, lm_head.weight (--embedding-bits 16)" in notes
    bits, notes = bits_of(Precision(4, 32, accuracy_level=1))
    assert bits == []
    assert "(8 bits are slow at accuracy level 1)" in notes


@pytest.mark.parametrize("bits", [4, 8])
def test_normalized_heads(bits):
    """Rows of Baichuan2's head have length 1, and so have the rows that the codes stand for: NormHead is exact."""
    from llmkit.decoder.contract import random_checkpoint
    from llmkit.onnx.quantized_weights import choose_grids, restored
    from llmkit.tensors.spec import DType

    precision = Precision(4, 16, embedding_bits=bits, accuracy_level=0)
    architecture = PLUGINS["baichuan"]
    config = architecture.tiny_config("baichuan2-7b")
    ckpt, model = random_checkpoint(architecture, config), architecture.bind(config)
    grids, _ = choose_grids(ckpt, model, precision, scale_dtype=DType.F32, provider="cpu")
    rows = restored(ckpt.tensors, model, grids)["lm_head.weight"].load()
    assert torch.allclose(rows.norm(dim=-1), torch.ones(len(rows)), atol=1e-6)
    stored = ckpt.tensors["lm_head.weight"].load()
    wanted = stored / stored.norm(dim=-1, keepdim=True)
    assert float((rows - wanted).norm() / wanted.norm()) < (0.12 if bits == 4 else 0.01)
    found, _, _ = nodes("baichuan", precision, "baichuan2-7b")
    assert any(n.op_type == "MatMulNBits" and n.name.startswith("/head") for n in found)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_every_matrix_that_stays_in_floats_is_named(case):
    name, variant = case
    _, sizes, notes = nodes(name, Precision(4, 16), variant)
    left = next((note for note in notes if note.startswith("matrices left in floats: ")), "")
    architecture = PLUGINS[name]
    model = architecture.bind(architecture.tiny_config(variant))
    for slot in model.slots.values():
        # Routers of experts are few numbers, which decide much: they are never rounded.
        if len(slot.shape) == 2 and slot.name in sizes and slot.kind not in ("parameter", "bias", "norm"):
            assert slot.name in left
            # Nothing that a family of this size multiplies with, but tables of rows that no block divides.
            assert slot.kind == "embedding"
            assert slot.id != "embed.weight" or slot.shape[1] % 16


def test_chosen_layers_stay_floats():
    found, sizes, notes = nodes("llama", Precision(4, 32, keep=["*.down_proj", "model.layers.0.*", "lm_head"]))
    integers = {n.inputs[1].name for n in found if n.op_type == "MatMulNBits"}
    assert integers
    assert not [n for n in integers if "down_proj" in n or "layers.0" in n or "lm_head" in n]
    assert "lm_head.weight" in sizes
    assert notes[0].startswith("6 matrices to int4 group 32 asymmetric")
    found, _, _ = nodes("llama", Precision(4, 32, only=["lm_head", "*.q_proj"]))
    integers = {n.inputs[1].name.removesuffix(".weight_codes") for n in found if n.op_type == "MatMulNBits"}
    assert integers == {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}


def test_accuracy_level():
    for level, expected in ((None, 4), (0, 0), (1, 1), (4, 4)):
        found, _, _ = nodes("llama", Precision(4, 32, accuracy_level=level))
        assert {n.attributes["accuracy_level"].value for n in found if n.op_type == "MatMulNBits"} == {expected}
    _, _, notes = nodes("llama", Precision(8, 32, accuracy_level=1))
    assert "8 bits at this level are slow" in notes[-1]


@pytest.mark.parametrize(
    ("precision", "error", "message"),
    [
        (Precision(3), InputError, "--bits 3: expected 4 or 8"),
        (Precision(4, 48), InputError, "--group-size 48: expected 16, 32, 64, 128, 256, channel or auto"),
        (Precision(4, accuracy_level=2), InputError, "--accuracy-level 2: expected 0 (the dtype of activations)"),
        (Precision(embedding_bits=8), InputError, "--embedding-bits says nothing without --bits"),
        (Precision(4, embedding_bits=2), InputError, "--embedding-bits 2: expected 4, 8, or 16 for floats"),
        (Precision(None, 32), InputError, "--group-size says nothing without --bits"),
        (Precision(keep=["lm_head"]), InputError, "has float weights, which nothing rounds"),
        (Precision(4, keep=["*.q_prj"]), SpecError, "'*.q_prj' matches no module and no tensor"),
        (Precision(4, only=["model.norm"]), SpecError, "nothing is left to quantize"),
    ],
)
def test_refusals(precision, error, message):
    with pytest.raises(error) as caught:
        nodes("llama", precision)
    assert message in caught.value.message
    assert caught.value.hint
