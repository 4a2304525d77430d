"""Merging against PEFT: what merge_and_unload gives, for every type and option that it can merge.

Tolerances. float16 and bfloat16: one unit in the last place, since both sides compute in float32 and round once and
only the order of the sums differs. float32: the order of the sums is all there is, so the bound is relative to the
size of the matrix (1e-6 of its largest element), not an ulp of elements that nearly cancel.
"""

from __future__ import annotations

import peft_world as world
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoHaConfig, LoKrConfig, LoraConfig, TrainableTokensConfig

from llmkit.transforms.lora import merge, open_adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA = {
    "lora": LoraConfig(r=4, lora_alpha=9, target_modules=ATTENTION),
    "mlp": LoraConfig(r=3, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"]),
    "rslora": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=ATTENTION),
    "patterns": LoraConfig(
        r=4, lora_alpha=8, target_modules=ATTENTION, rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 5},
        alpha_pattern={"k_proj": 3, "layers.0.self_attn.o_proj": 1},
    ),
    "saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "model.norm"]),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[7, 3, 71]),
    "tokens of both": LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [0, 1], "lm_head": [5]}
    ),
    "only tokens": TrainableTokensConfig(token_indices=[2, 5]),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": AdaLoraConfig(init_r=6, target_r=3, lora_alpha=7, total_step=10, target_modules=ATTENTION),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=ATTENTION),
    "lokr": LoKrConfig(r=3, alpha=5, target_modules=["q_proj", "k_proj", "down_proj"]),
    "lokr both": LoKrConfig(r=2, alpha=5, decompose_both=True, decompose_factor=4, target_modules=["q_proj", "o_proj"]),
    "lokr whole": LoKrConfig(r=64, alpha=5, target_modules=["q_proj"]),
    "orthogonal": LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=ATTENTION),
}  # fmt: skip
# PEFT rounds more than once here when the base is in half precision: the norms before it divides by them, the update
# of an
# embedding before it adds it, a head that comes with its update before it is updated. The oracle is then PEFT in
# float32, rounded once, as the formula says.
ROUNDED_TWICE = {
    "mica": LoraConfig(r=4, init_lora_weights="mica", target_modules=ATTENTION),
    "head": LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "embedding": LoraConfig(r=4, lora_alpha=5, target_modules=["embed_tokens", "q_proj"]),
    "dora": LoraConfig(r=4, lora_alpha=9, use_dora=True, target_modules=ATTENTION),
    "dora embedding": LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "down_proj"]),
}
BIASED = {
    "bias all": LoraConfig(r=4, bias="all", target_modules=["q_proj"]),
    "bias lora_only": LoraConfig(r=4, bias="lora_only", target_modules=["q_proj"]),
    "lora_bias": LoraConfig(r=4, lora_alpha=3, lora_bias=True, target_modules=["q_proj", "down_proj"]),
    "ia3 biased": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
CONV1D = {
    "conv1d": LoraConfig(r=4, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"]),
    "conv1d bias": LoraConfig(r=4, fan_in_fan_out=True, bias="all", target_modules=["c_attn"]),
    "conv1d ia3": IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    ),
    "conv1d adalora": AdaLoraConfig(init_r=6, total_step=10, fan_in_fan_out=True, target_modules=["c_attn"]),
    "conv1d dora": LoraConfig(r=4, fan_in_fan_out=True, use_dora=True, target_modules=["c_attn"]),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check(model, config, dtype, folder, *, oracle_dtype=None):
    base = world.save_base(model, folder / "base", dtype)
    world.train(model, config, folder / "adapter")
    expected = world.peft_merge(base, folder / "adapter", oracle_dtype or dtype)
    ckpt = world.open_base(base)
    found = world.loaded(merge(ckpt, [open_adapter(folder / "adapter")]))
    changed = 0
    for name, tensor in found.items():
        want = expected[name].to(dtype)
        assert (tensor.dtype, tensor.shape) == (dtype, want.shape), name
        changed += not torch.equal(tensor, ckpt.tensors[name].load())
        if dtype is torch.float32:
            assert (tensor - want).abs().max() <= 1e-6 * want.abs().max(), name
        else:
            assert world.ulps(tensor, want) <= 1, name
    assert changed, "the adapter changed nothing"
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LLAMA)
def test_equals_peft(kind, dtype, tmp_path):
    check(world.llama(), LLAMA[kind], DTYPES[dtype], tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BIASED)
def test_biases_equal_peft(kind, dtype, tmp_path):
    check(world.llama(biased=True), BIASED[kind], DTYPES[dtype], tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROUNDED_TWICE)
def test_equals_peft_in_float32(kind, dtype, tmp_path):
    check(world.llama(), ROUNDED_TWICE[kind], DTYPES[dtype], tmp_path, oracle_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONV1D)
def test_conv1d_equals_peft(kind, dtype, tmp_path):
    oracle = torch.float32 if "dora" in kind else None
    check(world.gpt2(), CONV1D[kind], DTYPES[dtype], tmp_path, oracle_dtype=oracle)
