"""LoRA on the stacked experts of models that no plugin describes: what PEFT merges, as transformers saves it."""

from __future__ import annotations

import json
import warnings

import peft_world as world
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import RequirementError, SpecError
from llmkit.tensors.lazy import Apply
from llmkit.tensors.source import SourceFile
from llmkit.transforms.lora import combine, extract, merge, open_adapter

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
    "llama4": ("Llama4TextConfig", {"num_local_experts": 3, "intermediate_size_mlp": 40, "moe_layers": [1]}),
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


def tiny(name, families=FAMILIES):
    config, extra = families[name]
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
    if kind == "all-linear" and name in ("gpt_oss", "gpt_oss of square experts", "llama4", "olmoe"):
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
            # What BLAS gives for a few rows alone and among others differs in the last place on some processors.
            is_same = torch.allclose if len(want) < SIZES["num_attention_heads"] else torch.equal
            assert is_same(found[tensor_name], want), tensor_name
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


@pytest.mark.parametrize("storage", ["one by one", "stacked"])
def test_experts_that_an_adapter_leaves_alone_are_copied(storage, tmp_path, monkeypatch):
    """An adapter of one matrix of one expert: no other weight becomes a tensor on its way, also out of a stack."""
    model = tiny("qwen3_moe")
    base = world.save_base(model, tmp_path / "base", torch.bfloat16)
    before = {name: lazy.load() for name, lazy in world.open_base(base).tensors.items()}
    if storage == "stacked":
        memory = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
        assert memory["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
        save_file(memory, base / "model.safetensors", {"format": "pt"})
    touched = "model.layers.1.mlp.experts.2.up_proj"
    a, b = torch.randn(4, 32), torch.randn(24, 4)
    parts = {f"base_model.model.{touched}.lora_A.weight": a, f"base_model.model.{touched}.lora_B.weight": b}
    (tmp_path / "a").mkdir()
    save_file(parts, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))

    merged = merge(open_checkpoint(base), [open_adapter(tmp_path / "a")])
    computed, n_read = [], [0]
    evaluate, fill = Apply.evaluate, SourceFile.fill

    def see_tensors(self, rows, context):
        computed.append({read.source.path.parent.name for read in self.output().reads()})
        return evaluate(self, rows, context)

    def count(self, view, offset):
        n_read[0] += len(view) if self.path.parent.name == "base" else 0
        return fill(self, view, offset)

    monkeypatch.setattr(Apply, "evaluate", see_tensors)
    monkeypatch.setattr(SourceFile, "fill", count)
    save(merged, tmp_path / "out")
    assert computed  # the sum, and what is made of the adapter alone
    assert all("a" in folders for folders in computed)
    found = load_file(tmp_path / "out" / "model.safetensors")
    weight = before[f"{touched}.weight"]
    before[f"{touched}.weight"] = (weight.float() + (b @ a) * 2).to(torch.bfloat16)
    assert set(found) == set(before)
    assert [name for name, want in before.items() if not torch.equal(found[name], want)] == []
    if storage == "stacked":
        assert n_read[0] == sum(t.nbytes for t in before.values())  # each row once


_ROUTED = {
    **FAMILIES,
    "phimoe": ("PhimoeConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "minimax_m2": ("MiniMaxM2Config", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": ["attention"] * 2, "mamba_n_heads": 4},
    ),
}


@pytest.mark.parametrize("name", _ROUTED)
def test_a_router_that_was_trained_whole_has_another_name_in_files(name, tmp_path):
    """Mixtral's files say block_sparse_moe.gate, transformers 5 and with it PEFT say mlp.gate."""
    model = tiny(name, _ROUTED)
    routers = {n.rpartition(".")[2] for n, m in model.named_modules() if "router" in type(m).__name__.lower()}
    routers |= {n.rpartition(".")[2] for n, m in model.named_modules() if "gating" in type(m).__name__.lower()}
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=sorted(routers))
    world.train(model, config, tmp_path / "a")
    base = world.save_base(model, tmp_path / "base", torch.float32)
    expected = merged_by_peft(base, tmp_path / "a", torch.float32, tmp_path / "peft")
    ckpt = world.open_base(base)
    found = merge(ckpt, [open_adapter(tmp_path / "a")])
    for tensor_name, want in expected.items():
        torch.testing.assert_close(found.tensors[tensor_name].load(), want, atol=2e-6, rtol=0)
    routed = [n for n in expected if not torch.equal(expected[n], ckpt.tensors[n].load()) and "q_proj" not in n]
    assert routed

    if ckpt.architecture is not None:  # and an extraction names it so that PEFT finds it
        save(extract(ckpt, open_checkpoint(tmp_path / "peft"), rank=32), tmp_path / "again")
        again = merged_by_peft(base, tmp_path / "again", torch.float32, tmp_path / "peft again")
        for tensor_name in routed:
            torch.testing.assert_close(again[tensor_name], expected[tensor_name], atol=0, rtol=0)
