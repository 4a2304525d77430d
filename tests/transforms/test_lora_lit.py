"""LoRA and adapter v2 of lit-llama and litgpt into bases of any layout: the formulas of their own code."""

from __future__ import annotations

import pytest
import torch
import yaml

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import RequirementError
from llmkit.transforms.lora import combine, merge, open_adapter

H, F, V, L, HEADS = 256, 96, 48, 2, 2


def state(heads, groups, size, *, fused, seed=0):
    """A random model in lit's names; `fused` names its parts: attention, projection, gate, up, down and the norms."""
    torch.manual_seed(seed)
    qkv, o, gate, up, down, norms, last = fused
    rows = (heads + 2 * groups) * size
    made = {"lm_head.weight": torch.randn(V, H), "transformer.wte.weight": torch.randn(V, H), last: torch.rand(H)}
    for i in range(L):
        at = f"transformer.h.{i}."
        made |= {at + qkv: torch.randn(rows, H), at + o: torch.randn(H, heads * size)}
        made |= {at + gate: torch.randn(F, H), at + up: torch.randn(F, H), at + down: torch.randn(H, F)}
        made |= {at + name: torch.rand(H) for name in norms}
    return made


LIT = (
    "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc1.weight", "mlp.c_fc2.weight", "mlp.c_proj.weight",
    ("rms_1.scale", "rms_2.scale"), "transformer.ln_f.scale",
)  # fmt: skip
GPT = (
    "attn.qkv.weight", "attn.proj.weight", "mlp.fc_1.weight", "mlp.fc_2.weight", "mlp.proj.weight",
    ("norm_1.weight", "norm_2.weight"), "transformer.ln_f.weight",
)  # fmt: skip
SETTINGS = {
    "name": "x", "n_embd": H, "n_head": 4, "n_query_groups": 2, "head_size": 64, "n_layer": L, "intermediate_size": F,
    "block_size": 64, "padded_vocab_size": V, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0, "parallel_residual": False, "bias": False,
}  # fmt: skip


def same(found, expected):
    assert set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert torch.allclose(found.tensors[name].load(), tensor.load(), atol=1e-5), name


def in_hf(folder, tmp_path):
    """The same model written in transformers' layout."""
    import llmkit

    llmkit.save(open_checkpoint(folder), tmp_path / "hf")
    return open_checkpoint(tmp_path / "hf")


def test_lora_of_lit_llama(tmp_path):
    """lit_llama/lora.py: block j of A with its own rows of B, times alpha / r, into q and v of the fused matrix."""
    base = state(HEADS, HEADS, 128, fused=LIT)
    lora, merged = {}, {k: v.clone() for k, v in base.items()}
    for i in range(L):
        at = f"transformer.h.{i}.attn.c_attn."
        a, b = torch.randn(8, H) * 0.1, torch.randn(2 * H, 4) * 0.1
        lora |= {at + "lora_A": a, at + "lora_B": b}
        merged[at + "weight"][:H] += 4.0 * b[:H] @ a[:4]
        merged[at + "weight"][2 * H :] += 4.0 * b[H:] @ a[4:]
    torch.save(lora, tmp_path / "lora.pth")
    for name, tensors in (("base", base), ("merged", merged)):
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / "lit-llama.pth")
    adapter = open_adapter(tmp_path / "lora.pth", alpha=16)
    with pytest.raises(RequirementError, match=r"names .transformer.h.0.attn.c_attn. are those of another program"):
        combine([adapter])
    expected = open_checkpoint(tmp_path / "merged" / "lit-llama.pth")
    same(merge(open_checkpoint(tmp_path / "base" / "lit-llama.pth"), [adapter]), expected)
    same(merge(in_hf(tmp_path / "base" / "lit-llama.pth", tmp_path), [adapter]), expected)


def litgpt_lora(folder, base, enabled):
    """A LoRA of litgpt on all linear layers with `enabled` of q, k, v, and the merged model, by litgpt/lora.py."""
    sizes = [4 * 64, 2 * 64, 2 * 64]
    on = [n for n, e in zip(sizes, enabled, strict=True) if e]
    starts = [s for s, e in zip((0, 256, 384), enabled, strict=True) if e]
    lora, merged = {}, {k: v.clone() for k, v in base.items()}
    for i in range(L):
        at = f"transformer.h.{i}."
        a, b = torch.randn(3 * len(on), H) * 0.1, torch.randn(sum(on), 3) * 0.1
        lora |= {f"{at}attn.qkv.lora_A": a, f"{at}attn.qkv.lora_B": b}
        for x, y, start in zip(a.split(3), b.split(on), starts, strict=True):
            merged[f"{at}attn.qkv.weight"][start : start + y.shape[0]] += 2.0 * y @ x
        for leaf in ("attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj"):
            weight = merged[f"{at}{leaf}.weight"]
            a, b = torch.randn(3, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], 3) * 0.1
            lora |= {f"{at}{leaf}.lora_A": a, f"{at}{leaf}.lora_B": b}
            weight += 2.0 * b @ a
    a, b = torch.randn(3, H) * 0.1, torch.randn(V, 3) * 0.1
    lora |= {"lm_head.lora_A": a, "lm_head.lora_B": b}
    merged["lm_head.weight"] += 2.0 * b @ a
    folder.mkdir()
    torch.save({"model": lora}, folder / "lit_model.pth.lora")
    flags = {f"lora_{k}": bool(e) for k, e in zip(("query", "key", "value"), enabled, strict=True)}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"lora_r": 3, "lora_alpha": 6, **flags}))
    (folder / "model_config.yaml").write_text(yaml.safe_dump(SETTINGS))
    return merged


@pytest.mark.parametrize("enabled", [(1, 0, 1), (1, 1, 1), (0, 1, 0)])
def test_lora_of_litgpt_with_grouped_queries(tmp_path, enabled):
    base = state(4, 2, 64, fused=GPT)
    merged = litgpt_lora(tmp_path / "a", base, enabled)
    for name, tensors in (("base", base), ("merged", merged)):
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / "lit_model.pth")
        (tmp_path / name / "model_config.yaml").write_text(yaml.safe_dump(SETTINGS))
    adapter, expected = open_adapter(tmp_path / "a"), open_checkpoint(tmp_path / "merged")
    same(merge(open_checkpoint(tmp_path / "base"), [adapter]), expected)
    same(merge(in_hf(tmp_path / "base", tmp_path), [adapter]), expected)


def test_lora_of_litgpt_into_a_base_that_fuses_more(tmp_path):
    """A base with gate and up in one matrix, whose LoRA has an A of its own for each."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=V, hidden_size=H, intermediate_size=F, num_hidden_layers=L, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    weights = model.state_dict()
    base = state(4, 2, 64, fused=GPT)
    for i in range(L):
        at, own = f"transformer.h.{i}.", f"model.layers.{i}."
        gate, up = weights[own + "mlp.gate_up_proj.weight"].chunk(2)
        base |= {at + "attn.qkv.weight": weights[own + "self_attn.qkv_proj.weight"].clone()}
        base |= {at + "mlp.fc_1.weight": gate.clone(), at + "mlp.fc_2.weight": up.clone()}
    merged = litgpt_lora(tmp_path / "a", base, (1, 1, 0))
    found = merge(open_checkpoint(tmp_path / "base"), [open_adapter(tmp_path / "a")])
    for i in range(L):
        at, own = f"transformer.h.{i}.", f"model.layers.{i}."
        both = torch.cat([merged[at + "mlp.fc_1.weight"], merged[at + "mlp.fc_2.weight"]])
        assert torch.allclose(found.tensors[own + "mlp.gate_up_proj.weight"].load(), both, atol=1e-5)
        qkv = found.tensors[own + "self_attn.qkv_proj.weight"].load()
        assert torch.allclose(qkv, merged[at + "attn.qkv.weight"], atol=1e-5)


def test_adapter_v2_of_lit_llama(tmp_path):
    """lit_llama/adapter_v2.py: y = scale * (W x + bias), and trained norms; its gated prompts only with force."""
    base = state(HEADS, HEADS, 128, fused=LIT)
    own, merged, biases = {}, {k: v.clone() for k, v in base.items()}, {}
    for i in range(L):
        for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc1", "mlp.c_fc2", "mlp.c_proj"):
            name = f"transformer.h.{i}.{leaf}"
            n = base[f"{name}.weight"].shape[0]
            own |= {f"{name}.adapter_scale": 1 + torch.rand(n), f"{name}.adapter_bias": torch.randn(n)}
            merged[f"{name}.weight"] *= own[f"{name}.adapter_scale"][:, None]
            biases[name] = own[f"{name}.adapter_scale"] * own[f"{name}.adapter_bias"]
        own[f"transformer.h.{i}.rms_1.scale"] = merged[f"transformer.h.{i}.rms_1.scale"] = torch.rand(H)
    own["transformer.ln_f.scale"] = merged["transformer.ln_f.scale"] = torch.rand(H)
    own |= {"transformer.h.1.attn.gating_factor": torch.zeros(1, HEADS, 1, 1)}
    torch.save(own, tmp_path / "v2.pth")
    for name, tensors in (("base", base), ("merged", merged)):
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / "lit-llama.pth")
    with pytest.raises(RequirementError, match="gated prompts"):
        open_adapter(tmp_path / "v2.pth")
    found = merge(open_checkpoint(tmp_path / "base" / "lit-llama.pth"), [open_adapter(tmp_path / "v2.pth", force=True)])
    expected = open_checkpoint(tmp_path / "merged" / "lit-llama.pth")
    for name, tensor in expected.tensors.items():
        assert torch.allclose(found.tensors[name].load(), tensor.load(), atol=1e-6), name
    assert (found.config["attention_bias"], found.config["mlp_bias"]) == (True, True)
    q = biases["transformer.h.1.attn.c_attn"][:H].view(HEADS, 64, 2).transpose(1, 2).reshape(H)
    assert torch.equal(found.tensors["model.layers.1.self_attn.q_proj.bias"].load(), q)
    up = found.tensors["model.layers.0.mlp.up_proj.bias"].load()
    assert torch.equal(up, biases["transformer.h.0.mlp.c_fc2"])
