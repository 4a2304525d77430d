"""`delta apply` and `delta make` against the published scripts, re-stated here in plain torch on whole state dicts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from delta_world import assert_same, checkpoint, loaded, tuned_of, weights
from transformers import LlamaConfig, LlamaForCausalLM

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.pipeline.plan import make_plan
from llmkit.pipeline.runner import run_plan
from llmkit.transforms import delta as delta_transform


def with_rows(state: dict, n: int, seed: int = 7) -> dict:
    g = torch.Generator().manual_seed(seed)
    grown = dict(state)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.randn(n, state[name].shape[1], generator=g) * 0.02
        grown[name] = torch.cat([state[name], rows.to(state[name].dtype)])
    return grown


def llama(state: dict, rows: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.float()


def alpaca_resized(raw: dict, rows: int) -> LlamaForCausalLM:
    """weight_diff.py and train.py: resize, then the mean of the old rows into the new ones of both matrices."""
    model = llama({k: v.float() for k, v in raw.items()}, rows)
    model.resize_token_embeddings(rows + 1, mean_resizing=False)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        data = embedding.weight.data
        data[-1:] = data[:-1].mean(dim=0, keepdim=True)
    return model


class TestAlpaca:
    @pytest.mark.parametrize("base_dtype", [torch.float16, torch.float32], ids=str)
    def test_recover_is_the_script(self, tmp_path: Path, base_dtype: torch.dtype) -> None:
        raw = weights(96, dtype=base_dtype)
        diff = with_rows(tuned_of(weights(96, seed=5, dtype=torch.float32), dtype=torch.float32), 1)
        base = checkpoint(tmp_path / "raw", raw)
        delta = checkpoint(tmp_path / "wdiff", diff, torch_dtype="float32")
        recovered = copy.deepcopy(diff)
        state_raw = alpaca_resized(raw, 96).state_dict()
        for key in recovered:
            recovered[key].add_(state_raw[key])
        result = delta_transform.apply(base, delta)
        assert "profile alpaca (detected: float32, 97 embedding rows over the base's 96)" in result.notes[0]
        assert_same(loaded(result), recovered)
        assert result.config["vocab_size"] == 97
        assert result.config["torch_dtype"] == "float32"

    def test_make_is_the_script(self, tmp_path: Path) -> None:
        raw = weights(96)
        tuned = with_rows(tuned_of(raw, dtype=torch.float32), 1)
        state_raw = alpaca_resized(raw, 96).state_dict()
        expected = copy.deepcopy(tuned)
        for key in expected:
            expected[key].add_(-state_raw[key])
        made = delta_transform.make(
            checkpoint(tmp_path / "raw", raw), checkpoint(tmp_path / "tuned", tuned), profile="alpaca"
        )
        assert_same(loaded(made), expected)

    def test_rotary_buffers_are_left_out_and_said(self, tmp_path: Path) -> None:
        raw, diff = weights(96), with_rows(weights(96, seed=5, dtype=torch.float32), 1)
        buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
        result = delta_transform.apply(
            checkpoint(tmp_path / "raw", raw | buffers), checkpoint(tmp_path / "wdiff", diff | buffers)
        )
        assert sorted(result.tensors) == sorted(diff)
        assert any("4 rotary buffers are left out" in n for n in result.notes)

    def test_slices_and_the_written_file_have_the_same_bits(self, tmp_path: Path) -> None:
        raw, diff = weights(96), with_rows(weights(96, seed=5, dtype=torch.float32), 1)
        result = delta_transform.apply(checkpoint(tmp_path / "raw", raw), checkpoint(tmp_path / "wdiff", diff))
        plan = make_plan(result, tmp_path / "out", slice_nbytes=1000)
        assert max(len(step.slices) for step in plan.steps) > 5
        run_plan(plan, workers=2)
        assert_same(loaded(open_checkpoint(tmp_path / "out")), loaded(result))


class TestFastChat:
    def apply(self, base: dict, delta: dict) -> dict:
        """apply_delta.py: both loaded as float16, added in place over the base's names."""
        model = {k: v.to(torch.float16) for k, v in base.items()}
        for name, param in model.items():
            assert name in delta
            param.data += delta[name].to(torch.float16)
        return model

    @pytest.mark.parametrize("base_dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
    def test_apply_is_the_script(self, tmp_path: Path, base_dtype: torch.dtype) -> None:
        base, delta = weights(dtype=base_dtype), weights(seed=3)
        result = delta_transform.apply(checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "d", delta))
        assert "profile vicuna (detected" in result.notes[0]
        assert_same(loaded(result), self.apply(base, delta))

    def test_make_is_the_script(self, tmp_path: Path) -> None:
        base = weights()
        tuned = tuned_of(base)
        expected = {k: v.clone() for k, v in tuned.items()}
        for name, param in expected.items():
            param.data -= base[name]
        made = delta_transform.make(
            checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "tuned", tuned), profile="vicuna"
        )
        assert_same(loaded(made), expected)

    def test_v0_starts_the_pad_row_from_zero(self, tmp_path: Path) -> None:
        base, delta = weights(96), with_rows(weights(96, seed=3), 1)
        delta["model.embed_tokens.weight"][-1, 0] = -0.0
        grown = {k: v.clone() for k, v in base.items()}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            grown[name] = torch.cat([base[name], torch.zeros(1, 64, dtype=torch.float16)])
        result = delta_transform.apply(checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "d", delta))
        assert "profile vicuna-v0 (detected" in result.notes[0]
        assert "force knowlm" in result.notes[0]
        assert_same(loaded(result), self.apply(grown, delta))

    def test_output_dtype_is_one_cast_at_the_end(self, tmp_path: Path) -> None:
        base, delta = weights(), weights(seed=3)
        pair = checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "d", delta)
        result = delta_transform.apply(*pair, dtype="bfloat16")
        assert_same(loaded(result), {k: v.bfloat16() for k, v in self.apply(base, delta).items()})
        assert result.config["torch_dtype"] == "bfloat16"


def test_llava_adds_the_overlap_and_keeps_the_rest(tmp_path: Path) -> None:
    base = weights(96)
    delta = with_rows(weights(96, seed=3), 3)
    delta["model.mm_projector.weight"] = torch.randn(64, 32).half()
    delta["model.mm_projector.bias"] = torch.randn(64).half()
    expected = {k: v.clone() for k, v in delta.items()}
    for name, param in expected.items():  # llava apply_delta.py
        if name not in base:
            assert name in ("model.mm_projector.weight", "model.mm_projector.bias")
        elif param.data.shape == base[name].shape:
            param.data += base[name]
        else:
            assert name in ("model.embed_tokens.weight", "lm_head.weight")
            bparam = base[name]
            param.data[: bparam.shape[0], : bparam.shape[1]] += bparam
    d = checkpoint(tmp_path / "d", delta, architectures=["LlavaLlamaForCausalLM"], model_type="llava")
    result = delta_transform.apply(checkpoint(tmp_path / "base", base), d)
    assert "profile llava (detected: it has an mm_projector)" in result.notes[0]
    assert_same(loaded(result), expected)


def test_overlap_of_narrower_bases(tmp_path: Path) -> None:
    from llmkit.tensors.spec import DType
    from llmkit.transforms.delta.arithmetic import overlapped

    base, delta = torch.randn(5, 3).half(), torch.randn(8, 4).half()
    expected = delta.clone()
    expected[:5, :3] += base
    ckpt = checkpoint(
        tmp_path / "m", {"model.layers.0.a": base, "model.layers.0.b": delta, "embed_tokens.weight": base + 1}
    )
    lazy = overlapped(+1, ckpt.tensors["model.layers.0.a"], ckpt.tensors["model.layers.0.b"], DType.F16, DType.F16)
    assert torch.equal(lazy.load(), expected)


def test_ziya_stores_embedding_and_head_whole(tmp_path: Path) -> None:
    base, delta = weights(96), with_rows(weights(96, seed=3), 40)
    expected = {k: v.clone() for k, v in delta.items()}
    for name, param in expected.items():  # fengshen apply_delta.py
        if "embed_tokens" in name or "lm_head.weight" in name or "self_attn.rotary_emb.inv_freq" in name:
            continue
        param.data += base[name]
    pair = checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "d", delta)
    result = delta_transform.apply(*pair, profile="ziya")
    assert (
        "profile ziya (forced): arithmetic in float16, *embed_tokens* and *lm_head.weight* are full values"
        in (result.notes[0])
    )
    assert_same(loaded(result), expected)


def test_alpaca_farm_reward_model(tmp_path: Path) -> None:
    raw = weights(96)
    inner = with_rows(weights(96, seed=5, dtype=torch.float32), 1)
    delta = {f"backbone_model.{k}": v for k, v in inner.items()} | {"reward_head.weight": torch.randn(1, 64)}
    expected = {k: v.clone() for k, v in delta.items()}
    state_raw = alpaca_resized(raw, 96).state_dict()
    for key, value in state_raw.items():  # recover_model_weights.py: iterates the raw names
        expected[f"backbone_model.{key}"].add_(value)
    d = checkpoint(tmp_path / "d", delta, architectures=["RewardModel"])
    result = delta_transform.apply(checkpoint(tmp_path / "raw", raw), d)
    assert "profile alpaca-farm" in result.notes[0]
    assert_same(loaded(result), expected)


def test_alpaca_farm_keeps_mismatched_sizes_whole(tmp_path: Path) -> None:
    raw, delta = weights(96), with_rows(weights(96, seed=5, dtype=torch.float32), 8)
    d = checkpoint(tmp_path / "d", delta, files={"model_sum.txt": "12.5\n"})
    result = delta_transform.apply(checkpoint(tmp_path / "raw", raw), d)
    found = loaded(result)
    assert torch.equal(found["lm_head.weight"], delta["lm_head.weight"])
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(found[name], delta[name] + raw[name].float())
    assert result.history[-1]["expected_sums"][0]["value"] == 12.5
    assert "model_sum.txt" not in result.files


def test_open_chinese_delta_is_added_in_float32_then_halved(tmp_path: Path) -> None:
    base, delta = weights(), weights(seed=3)
    rope = {"rope.freqs": torch.ones(4)}
    result = delta_transform.apply(
        checkpoint(tmp_path / "base", base | rope), checkpoint(tmp_path / "d", delta), profile="open-chinese-llama"
    )
    assert_same(loaded(result), {k: (base[k].float() + delta[k].float()).half() for k in base})


def test_billa_unmasks_the_embedding_only(tmp_path: Path) -> None:
    base, release = weights(96), with_rows(weights(96, seed=3), 30)
    result = delta_transform.apply(
        checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "release", release), profile="billa"
    )
    expected = {k: v.clone() for k, v in release.items()}
    expected["model.embed_tokens.weight"][:96] -= base["model.embed_tokens.weight"]
    assert_same(loaded(result), expected)


@pytest.mark.parametrize("side", ["base", "delta"])
def test_tied_heads(tmp_path: Path, side: str) -> None:
    """A side that ties its head stores none: the embedding stands in for the base's, the delta's is dropped."""
    base, delta = weights(), weights(seed=3)
    expected = {k: base[k] + delta[k] for k in base}
    tied = {"base": {}, "delta": {}}
    tied[side] = {"tie_word_embeddings": True}
    if side == "base":
        del base["lm_head.weight"]
        expected["lm_head.weight"] = base["model.embed_tokens.weight"] + delta["lm_head.weight"]
    else:
        del delta["lm_head.weight"], expected["lm_head.weight"]
    result = delta_transform.apply(
        checkpoint(tmp_path / "base", base, **tied["base"]), checkpoint(tmp_path / "d", delta, **tied["delta"])
    )
    assert_same(loaded(result), expected)
    assert any("lm_head.weight" in n and "tie" in n for n in result.notes)


def test_tokenizer_comes_from_the_delta_and_the_card_from_neither(tmp_path: Path) -> None:
    base, delta = weights(), weights(seed=3)
    b = checkpoint(
        tmp_path / "base", base, {"tokenizer.json": "{}", "README.md": "base", "generation_config.json": "{}"}
    )
    d = checkpoint(tmp_path / "d", delta, {"tokenizer_config.json": '{"a": 1}', "README.md": "apply me"})
    result = delta_transform.apply(b, d)
    assert sorted(result.files) == ["generation_config.json", "tokenizer_config.json"]
    assert "tokenizer from the delta (d)" in result.notes
    assert result.history == ({"transform": "delta.apply", "base": "base", "delta": "d", "profile": "vicuna"},)
    d = checkpoint(tmp_path / "d2", delta)
    result = delta_transform.apply(b, d)
    assert sorted(result.files) == ["generation_config.json", "tokenizer.json"]
    assert any("no tokenizer files: those of base are taken" in w for w in result.warnings)


def test_a_delta_file_without_a_config(tmp_path: Path) -> None:
    base, delta = weights(96), with_rows(weights(96, seed=3), 1)
    checkpoint(tmp_path / "d", delta)
    (tmp_path / "d" / "config.json").unlink()
    result = delta_transform.apply(
        checkpoint(tmp_path / "base", base), open_checkpoint(tmp_path / "d" / "model.safetensors")
    )
    assert result.config["vocab_size"] == 97
    assert result.config["hidden_size"] == 64
