"""GGUF files made with statistics of the inputs: the columns with large inputs come out closer, in every storage."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.statistics import open_statistics
from llmkit.decoder.contract import random_checkpoint
from llmkit.transforms.convert import convert

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
import imatrix_world as world

ARCHITECTURES = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}


def restored(ckpt, folder, kind, statistics=None):
    """The matrices of the file as the library reads them, by name, and their types."""
    found = open_statistics(statistics, ckpt) if statistics is not None else None
    llmkit.save(convert(ckpt, to="gguf", type=kind, statistics=found), folder)
    tensors = [t for t in gguf.GGUFReader(next(folder.glob("*.gguf"))).tensors if len(t.shape) > 1]
    return {t.name: (quants.dequantize(t.data, t.tensor_type), t.tensor_type.name) for t in tensors}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_columns_with_large_inputs_come_out_closer(tmp_path, family):
    ckpt = random_checkpoint(ARCHITECTURES[family], ARCHITECTURES[family].tiny_config())
    exact = restored(ckpt, tmp_path / "f32", "f32")
    names = [name for name, (x, _) in exact.items() if name.startswith("blk.1") and x.shape[1] % 32 == 0]
    assert len(names) > 2
    squares = {n: np.random.default_rng(0).gamma(0.3, 1, exact[n][0].shape[1]).astype("<f4") for n in names}
    statistics = world.of_gguf(tmp_path / "imatrix.gguf", squares)
    found = {
        given is None: restored(ckpt, tmp_path / str(given is None), "iq4_nl", given) for given in (None, statistics)
    }
    for name in names:
        errors = [
            ((x - exact[name][0]) ** 2 * squares[name]).mean() for x, _ in (found[False][name], found[True][name])
        ]
        assert errors[0] < 0.9 * errors[1], name
    for name in set(exact) - set(names):  # nothing is known of their inputs
        assert np.array_equal(found[False][name][0], found[True][name][0])


def test_each_expert_has_its_own_inputs(tmp_path):
    """Expert 1 saw no token, and is rounded as without statistics; blocks that are read stay as they are."""
    family = ARCHITECTURES["qwen3_moe"]
    ckpt = random_checkpoint(family, family.tiny_config())
    exact = restored(ckpt, tmp_path / "f32", "f32")
    name = "blk.1.ffn_up_exps.weight"
    squares = np.random.default_rng(0).gamma(0.3, 1, (8, 32)).astype("<f4")
    counts = np.array([5, 0, *[7] * 6], "<f4")[:, None]
    statistics = world.of_gguf(tmp_path / "imatrix.gguf", {name: squares}, counts=counts)
    plain = restored(ckpt, tmp_path / "plain", "iq4_nl")
    found = restored(ckpt, tmp_path / "measured", "iq4_nl", statistics)
    for e in range(8):
        errors = [((x[name][0][e] - exact[name][0][e]) ** 2 * squares[e]).mean() for x in (found, plain)]
        assert errors[0] < 0.9 * errors[1] if e != 1 else errors[0] == errors[1]
    kept = restored(llmkit.open_checkpoint(tmp_path / "plain"), tmp_path / "again", None)
    assert kept[name][1] == "IQ4_NL"
    assert np.array_equal(kept[name][0], plain[name][0])


def test_what_files_have_head_by_head_is_rounded_without(tmp_path):
    """llama-imatrix measures the halves of kv_b for each head, and that of the keys has other columns."""
    family = ARCHITECTURES["deepseek3"]
    ckpt = random_checkpoint(family, {**family.tiny_config(), "kv_lora_rank": 32, "qk_nope_head_dim": 32})
    names = {"blk.1.attn_k_b.weight": 4, "blk.1.attn_v_b.weight": 4, "blk.1.attn_output.weight": 1}
    squares = {name: np.random.default_rng(0).gamma(0.3, 1, (n, 32)).astype("<f4") for name, n in names.items()}
    for name, n in names.items():
        statistics = world.of_gguf(tmp_path / f"{n}.gguf", {name: squares[name]}, counts=np.full((n, 1), 9, "<f4"))
        plain, found = (
            restored(ckpt, tmp_path / f"{name}{given is None}", "iq4_nl", given) for given in (None, statistics)
        )
        assert np.array_equal(plain[name][0], found[name][0]) == (n == 4)
        assert plain[name][1] == "IQ4_NL"
