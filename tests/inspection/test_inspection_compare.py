"""Differences of two models, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.formats import safetensors
from llmkit.inspection.comparison import compare

LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 8,
}  # fmt: skip


def checkpoint(folder, name, tensors, **config):
    path = folder / f"{name}.safetensors"
    save_file(tensors, str(path))
    return Checkpoint(name, safetensors.read(path)[0], config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_figures_equal_plain_torch(tmp_path, dtype):
    """Of a tensor that is read in two slices of 8 MiB, each in blocks."""
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(2**23 // dtype.itemsize // 1021 + 5, 1021, generator=generator) * 50).to(dtype)
    b = a.clone()
    b[5] = b[5] + 3
    b[-1, 20] = -100
    found = compare(
        checkpoint(tmp_path, "a", {"w": a, "s": a[0, 0].clone()}),
        checkpoint(tmp_path, "b", {"w": b, "s": a[0, 0].clone()}),
    )
    worst, same = found.differences
    x, y = a.double(), b.double()
    assert worst.name == "w"
    assert worst.max_abs == float((y - x).abs().max())
    assert worst.relative_l2 == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)
    assert worst.cosine == pytest.approx(float(torch.dot(x.flatten(), y.flatten()) / x.norm() / y.norm()), rel=1e-12)
    assert worst.n_changed == int((a != b).sum())
    assert (same.max_abs, same.relative_l2, same.n_changed) == (0, 0, 0)
    assert not found.is_same(0)
    assert found.is_same(worst.max_abs)


def test_names_shapes_dtypes_config_and_order(tmp_path):
    a = checkpoint(
        tmp_path,
        "a",
        {"x": torch.ones(2), "gone": torch.ones(1), "r": torch.ones(2, 3), "n": torch.ones(4)},
        k=1,
        same=2,
    )
    b = checkpoint(
        tmp_path,
        "b",
        {"x": torch.ones(2).half(), "new": torch.ones(1), "r": torch.ones(3, 2), "n": 2 * torch.ones(4)},
        k=3,
        same=2,
    )
    found = compare(a, b)
    assert (found.removed, found.added) == (("gone",), ("new",))
    assert found.reshaped == {"r": ((2, 3), (3, 2))}
    assert found.retyped == {"x": ("F32", "F16")}
    assert found.config == {"k": (1, 3)}
    assert [d.name for d in found.differences] == ["n", "x"]


def test_nan_and_infinity(tmp_path):
    nan, inf = math.nan, math.inf
    a = {"both": torch.tensor([nan, 1.0, inf]), "one": torch.tensor([1.0, 2.0]), "zero": torch.zeros(2)}
    b = {"both": torch.tensor([nan, 1.5, inf]), "one": torch.tensor([nan, 2.0]), "zero": torch.ones(2)}
    found = {d.name: d for d in compare(checkpoint(tmp_path, "a", a), checkpoint(tmp_path, "b", b)).differences}
    assert (found["both"].max_abs, found["both"].n_changed) == (0.5, 1)
    assert math.isnan(found["one"].max_abs)
    assert found["one"].n_changed == 1
    assert (found["zero"].relative_l2, found["zero"].cosine) == (inf, None)
    both = compare(checkpoint(tmp_path, "c", a), checkpoint(tmp_path, "d", b))
    assert both.differences[0].name == "one"
    assert not both.is_same(1e9)


def test_negative_zero_and_eight_bit_floats(tmp_path):
    a = {"z": torch.tensor([0.0]), "f": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), "empty": torch.empty(0, 3)}
    b = {"z": torch.tensor([-0.0]), "f": torch.tensor([1.0, 4.0]).to(torch.float8_e4m3fn), "empty": torch.empty(0, 3)}
    found = {d.name: d for d in compare(checkpoint(tmp_path, "a", a), checkpoint(tmp_path, "b", b)).differences}
    assert found["z"].n_changed == 0
    assert (found["f"].max_abs, found["f"].n_changed) == (2.0, 1)
    assert found["empty"].max_abs == 0


def test_progress_counts_all_bytes(tmp_path):
    seen = []

    class Progress:
        def begin(self, total, label, unit="B"):
            seen.append(total)

        def advance(self, n, note=""):
            seen.append(-n)

        def end(self):
            seen.append(0)

    tensors = {"a": torch.ones(1000), "b": torch.ones(3, 5)}
    compare(checkpoint(tmp_path, "a", tensors), checkpoint(tmp_path, "b", tensors), progress=Progress())
    assert sum(seen) == 0
    assert seen[0] == 4060


def test_architectures_that_differ_are_said(tmp_path):
    llama, gpt2 = (
        checkpoint(tmp_path, name, {"w": torch.ones(2)}, architectures=[name])
        for name in ("LlamaForCausalLM", "GPT2LMHeadModel")
    )
    assert compare(llama, gpt2).architectures == ("LlamaForCausalLM", "GPT2LMHeadModel")
    assert compare(llama, llama).architectures == ()


def test_a_buffer_that_the_model_does_without_is_no_difference(tmp_path):
    """Old files of LLaMA store the tables of rotary positions; without a family's word a name counts."""
    w, name = {"w": torch.ones(2)}, "model.layers.0.self_attn.rotary_emb.inv_freq"
    for config, is_same in (({"model_type": "llama"}, False), (LLAMA, True), ({}, False)):
        a = checkpoint(tmp_path, "a", w | {name: torch.ones(2)}, **config)
        b = checkpoint(tmp_path, "b", w, **config)
        for found, side in ((compare(a, b), "removed"), (compare(b, a), "added")):
            assert found.is_same(0) == is_same
            assert found.unneeded == ((name,) if is_same else ())
            assert getattr(found, side) == (() if is_same else (name,))
    assert not compare(a.derive(tensors={**a.tensors, "v": a.tensors["w"]}), b).is_same(0)
