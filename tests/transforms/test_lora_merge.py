"""Merging against PEFT: the bits of merge_and_unload, for every type and option that it can merge."""

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
# PEFT rounds more than once here when the base is in half precision: the update of an embedding before it adds it, a
# head that comes with its update before it is updated.
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
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(model, config, folder):
    world.train(model, config, folder / "adapter")
    for dtype in DTYPES:
        base = world.save_base(model, folder / str(dtype), dtype)
        expected = world.peft_merge(base, folder / "adapter", dtype)
        ckpt = world.open_base(base)
        found = world.loaded(merge(ckpt, [open_adapter(folder / "adapter")]))
        changed = 0
        for name, tensor in found.items():
            want = expected[name]
            assert (tensor.dtype, tensor.shape) == (dtype, want.shape), name
            changed += not torch.equal(tensor, ckpt.tensors[name].load())
            assert world.ulps(tensor, want) == 0, (name, dtype)
        assert changed, "the adapter changed nothing"


@pytest.mark.parametrize("kind", LLAMA)
def test_equals_peft(kind, tmp_path):
    check(world.llama(), LLAMA[kind], tmp_path)


@pytest.mark.parametrize("kind", BIASED)
def test_biases_equal_peft(kind, tmp_path):
    check(world.llama(biased=True), BIASED[kind], tmp_path)


@pytest.mark.parametrize("kind", ROUNDED_TWICE)
def test_equals_peft_where_it_rounds_twice(kind, tmp_path):
    check(world.llama(), ROUNDED_TWICE[kind], tmp_path)


@pytest.mark.parametrize("kind", CONV1D)
def test_conv1d_equals_peft(kind, tmp_path):
    check(world.gpt2(), CONV1D[kind], tmp_path)


def test_adalora_of_pruned_ranks_scales_as_in_training(tmp_path):
    """PEFT keeps the rank before pruning in the divisor; the ranks that are left are those of the tensors."""
    model = world.llama(layers=3)
    base = world.save_base(model, tmp_path / "base")
    config = AdaLoraConfig(init_r=6, target_r=3, lora_alpha=7, total_step=10, target_modules=["q_proj"])
    pattern = {f"model.layers.{i}.self_attn.q_proj.lora_E": [True, False, True, i == 1, False, True] for i in range(2)}
    pattern["model.layers.2.self_attn.q_proj.lora_E"] = [False] * 6
    live = world.train(model, config, tmp_path / "whole")
    live.peft_config["default"].rank_pattern = {k.replace("lora_E", "lora_E.default"): v for k, v in pattern.items()}
    live.save_pretrained(tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter")
    assert sorted(adapter.ranks.values()) == [3, 4]
    assert any("model.layers.2.self_attn.q_proj has rank 0" in note for note in adapter.notes)
    expected = world.peft_merge(base, tmp_path / "adapter", torch.float32)
    for name, tensor in world.loaded(merge(world.open_base(base), [adapter])).items():
        assert (tensor - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_another_dtype_is_that_of_a_base_loaded_in_it(tmp_path, stored, dtype):
    """transformers casts when it loads, PEFT adds and casts again: so does --dtype, and says that it rounds."""
    base = world.save_base(world.llama(), tmp_path / "base", stored)
    world.train(world.llama(), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"]), tmp_path / "a")
    expected = world.peft_merge(base, tmp_path / "a", dtype)
    made = merge(world.open_base(base), [open_adapter(tmp_path / "a")], dtype=str(dtype).removeprefix("torch."))
    for name, tensor in world.loaded(made).items():
        assert torch.equal(tensor, expected[name]), name
    assert any("rounded before" in note for note in made.notes) == (dtype != stored and dtype is not torch.float32)


@pytest.mark.parametrize("shape", [(65, 130, 7), (130, 65, 3), (200, 33, 20), (64, 64, 300)])
def test_products_in_blocks_have_the_bits_of_the_whole(shape):
    """BLAS takes another kernel for few rows: the last block is filled up, so that its order of sums is that of all."""
    from llmkit.transforms.lora.arithmetic import BLOCK_ROWS, _rows_of

    n_out, n_in, rank = shape
    a, b = torch.randn(rank, n_in), torch.randn(n_out, rank)
    rows = [slice(i, i + BLOCK_ROWS) for i in range(0, n_out, BLOCK_ROWS)]
    assert torch.equal(torch.cat([_rows_of(b, r, a) for r in rows]), b @ a)
    flipped = [slice(i, i + BLOCK_ROWS) for i in range(0, n_in, BLOCK_ROWS)]
    left, right = a.T.contiguous(), b.T.contiguous()
    assert torch.equal(torch.cat([_rows_of(left, r, right) for r in flipped]), (b @ a).T)


@pytest.mark.parametrize("flag", [True, False])
def test_an_undescribed_model_is_transposed_where_its_shapes_say_so(tmp_path, flag):
    """A family of Conv1D layers without a plugin; the config's flag is only what PEFT was told."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    model = world.spread(OpenAIGPTLMHeadModel(config).eval())
    base = world.save_base(model, tmp_path / "base")
    made = LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    world.train(model, made, tmp_path / "a")
    expected = world.peft_merge(base, tmp_path / "a", torch.float32)
    adapter = open_adapter(world.edit_config(tmp_path / "a", fan_in_fan_out=flag))
    for name, tensor in world.loaded(merge(world.open_base(base), [adapter])).items():
        assert torch.equal(tensor, expected[name]), name
