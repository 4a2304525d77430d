"""LoRA on the stacked experts of models that no plugin describes: what PEFT merges, as transformers saves it."""

from __future__ import annotations

import warnings

import peft_world as world
import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmkit.errors import RequirementError, SpecError
from llmkit.transforms.lora import combine, merge, open_adapter

warnings.filterwarnings("ignore", module="peft")

from peft import LoraConfig, PeftModel  # noqa: E402

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="older transformers keep experts apart")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 3, "moe_intermediate_size": 24, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "gpt_oss of square experts": (
        "GptOssConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 32},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 3, "num_experts_per_tok": 2}),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
KINDS = {
    "both": LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=BOTH),
    "one, with attention": LoraConfig(
        r=3, lora_alpha=4, use_rslora=True, target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    ),
    "ranks": LoraConfig(
        r=2, lora_alpha=3, target_modules=[], target_parameters=BOTH, rank_pattern={"experts.gate_up_proj": 4},
        alpha_pattern={"down_proj": 9},
    ),
    "all-linear": LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"),
}  # fmt: skip


def tiny(name):
    config, extra = FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**SIZES, **extra})
    return world.spread(transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval())


def merged_by_peft(base, adapter, dtype, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_stacked_experts_equal_peft(name, kind, tmp_path):
    if kind == "all-linear" and name in ("gpt_oss", "gpt_oss of square experts", "olmoe"):
        pytest.skip("PEFT's all-linear does not reach these experts")
    model = tiny(name)
    world.train(model, KINDS[kind], tmp_path / "a")
    for dtype in (torch.float32, torch.bfloat16) if kind == "both" else (torch.float32,):
        base = world.save_base(model, tmp_path / f"base {dtype}", dtype)
        expected = merged_by_peft(base, tmp_path / "a", dtype, tmp_path / f"peft {dtype}")
        ckpt = world.open_base(base)
        found = world.loaded(merge(ckpt, [open_adapter(tmp_path / "a")]))
        assert set(found) == set(expected)
        changed = 0
        for tensor_name, want in expected.items():
            assert torch.equal(found[tensor_name], want), tensor_name
            changed += not torch.equal(want, ckpt.tensors[tensor_name].load())
        assert changed >= 2


def test_an_update_that_fits_no_parameter_is_refused(tmp_path):
    world.train(tiny("mixtral"), KINDS["both"], tmp_path / "a")
    other = world.open_base(world.save_base(tiny("qwen3_moe"), tmp_path / "other"))
    adapter = open_adapter(tmp_path / "a")
    with pytest.raises(
        SpecError, match=r"updates of .*experts \(.*down_proj.*the base has .*gate_up_proj \[3, 48, 32\]"
    ):
        merge(other, [adapter])
    with pytest.raises(RequirementError, match="bare parameters"):
        combine([adapter])
