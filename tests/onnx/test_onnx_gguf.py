"""GGUF files on ONNX Runtime: which types keep their integers, bit for bit, and mixtures of types."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from test_onnx_kept_grids import matrices_in, parts_in

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.inspection.summary import summarize
from llmkit.onnx.export import computed_weights, export
from llmkit.onnx.parity import compare_decoders

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
from gguf_models import written
from tiny_graphs import exported_decoders

KEPT = {"Q4_0": 4, "Q5_0": 8, "Q8_0": 8, "Q3_K": 4, "Q6_K": 8, "IQ4_NL": 8, "IQ4_XS": 8, "MXFP4": 8,
        "Q4_1": 4, "Q5_1": 8, "Q2_K": 4, "Q4_K": 4, "Q5_K": 8}  # fmt: skip
NAMES = {"v_proj": "attn_v", "down_proj": "ffn_down"}


def same_weights(path, out):
    """Every matrix of the exported folder against the library's floats: how many there are."""
    ckpt = open_checkpoint(path)
    raw = {t.name: t for t in gguf.GGUFReader(path).tensors}
    kept, given = matrices_in(out), computed_weights(ckpt).tensors
    parts, _ = parts_in(out)
    for name, found in kept.items():
        offsets = parts.get(f"{name}_offsets")
        wanted = ckpt.tensors[name].load().numpy()  # dequantized by gguf.quants, rows in order
        assert np.array_equal(given[name].load().numpy(), wanted), name
        if offsets is None:
            assert np.array_equal(found, wanted), name
        else:  # the offset of the middle of the range is rounded to float32
            whole = found + np.repeat(offsets, found.shape[1] // offsets.shape[1], 1)
            assert np.abs(whole - wanted).max() <= 2e-7 * np.abs(wanted).max(), name
        last = name.split(".")[-2]
        if last in NAMES:  # q and k are in another order there
            layer = name.split(".")[2]
            stored = raw[f"blk.{layer}.{NAMES[last]}.weight"]
            assert np.array_equal(wanted, gguf.quants.dequantize(stored.data, stored.tensor_type)), name
    return len(kept)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KEPT)
def test_blocks_keep_their_integers(tmp_path, kind, tied):
    path = written(tmp_path, lambda name: kind, tie_word_embeddings=tied)
    plan = export(open_checkpoint(path))
    # Matrices of two layers, the embedding, and a head of its own.
    assert plan.notes[0].startswith(f"{15 if tied else 16} matrices stay on the grid that they are stored on ({kind}")
    save(plan, tmp_path / "out")
    assert same_weights(path, tmp_path / "out") == 15  # an embedding without a head is in no product
    assert summarize(open_checkpoint(tmp_path / "out")).n_parameters == summarize(open_checkpoint(path)).n_parameters
    _, graph = parts_in(tmp_path / "out")
    assert {n.attributes["bits"].value for n in graph if n.op_type == "MatMulNBits"} == {KEPT[kind]}
    differences = compare_decoders(*exported_decoders(tmp_path / "out", open_checkpoint(path)))
    assert all(d.largest <= 1e-5 for d in differences), differences


def test_types_of_one_file_may_differ(tmp_path):
    """As llama.cpp mixes them in Q4_K_M: some matrices in six bits, and what no grid holds beside them."""

    def type_of(name):
        if "ffn_down" in name:
            return "IQ2_XXS" if "blk.1" in name else "Q6_K"
        return "Q6_K" if "attn_v" in name or "token_embd" in name else "Q5_0" if "attn_q" in name else "Q4_K"

    path = written(tmp_path, type_of)
    plan = export(open_checkpoint(path))
    assert plan.notes[0].startswith("15 matrices stay on the grid that they are stored on (")
    assert plan.notes[1].startswith(
        "1 quantized matrix becomes floats (1 IQ2_XXS: model.layers.1.mlp.down_proj.weight)"
    )
    save(plan, tmp_path / "out")
    same_weights(path, tmp_path / "out")
    differences = compare_decoders(*exported_decoders(tmp_path / "out", open_checkpoint(path)))
    assert all(d.largest <= 1e-5 for d in differences), differences


def test_sums_of_blocks_are_made_once(tmp_path):
    """Query, key and value see the same hidden states, gate and up too: four sums a layer, and one for the head."""
    path = written(tmp_path, lambda name: "Q4_K")
    save(export(open_checkpoint(path)), tmp_path / "out")
    _, graph = parts_in(tmp_path / "out")
    assert sum(n.op_type == "MatMulNBits" for n in graph) == 15
    assert sum(n.op_type == "ReduceSum" for n in graph) == 9


@pytest.mark.parametrize(("kind", "dtype", "is_rounded"), [("Q6_K", "float16", True), ("Q6_K", "float32", False),
                                                         ("Q8_0", "float16", False)])  # fmt: skip
def test_scales_that_half_precision_rounds_are_told(tmp_path, kind, dtype, is_rounded):
    """A K-quant's scale is a product of float16 and an integer, exact in float32; that of Q8_0 is float16 itself."""
    plan = export(open_checkpoint(written(tmp_path, lambda name: kind)), dtype=dtype)
    found = [note for note in plan.notes if "finer scales" in note]
    wanted = (
        "16 of them have finer scales than float16, in which the operators take them: those are rounded to it "
        "(--dtype float32 keeps them)"
    )
    assert found == ([wanted] if is_rounded else [])
