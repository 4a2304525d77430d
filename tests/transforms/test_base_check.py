"""The measured checks: what the right base and every kind of wrong one score, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_world import checkpoint, config, tuned_of, weights

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import RequirementError
from llmkit.tensors.lazy import Context
from llmkit.tensors.spec import DType
from llmkit.transforms.convert import convert
from llmkit.transforms.delta.base_check import check_base, measure, rounded, sampled_rows
from llmkit.transforms.delta.base_structure import raise_refusals
from llmkit.transforms.delta.profiles import find_profile

SIZES = {"hidden": 128, "layers": 3, "ffn": 256}
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def difference(tuned: dict, base: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) - base[k].to(dtype) for k, v in tuned.items()}


def world(scale: float, dtype: torch.dtype) -> dict[str, dict]:
    """A half-precision base, what tuning makes of it in `dtype`, and the wrong bases."""
    stored = BF16 if dtype == BF16 else F16
    base = weights(96, dtype=stored, **SIZES)
    tuned = tuned_of(base, scale=scale, dtype=dtype)
    return {
        "right": base,
        "unrelated": weights(96, seed=9, dtype=stored, **SIZES),
        "tuned": tuned,
        "tuned-in-half": {k: v.half() for k, v in tuned.items()},
        "other-tuned": tuned_of(base, seed=8, dtype=stored),
        "rounded": {k: v.bfloat16().half() for k, v in base.items()},
        "delta": difference(tuned, base, dtype),
    }


def findings(tmp_path: Path, states: dict[str, dict], base: str, delta: str = "delta", **kwargs):
    pair = [checkpoint(tmp_path / name, states[name]) for name in (base, delta)]
    return check_base(*pair, **kwargs)


def codes(found) -> list[tuple[str, str]]:
    return [(f.level, f.code) for f in found]


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("scale", [0.002, 0.02, 0.2])
class TestTuning:
    """From a light touch to a heavy one: the size of the delta does not matter to the verdict."""

    profile = {F16: "vicuna", BF16: "plain", F32: "plain"}

    def verdict(self, tmp_path, scale, dtype, base):
        return findings(tmp_path, world(scale, dtype), base, profile=self.profile[dtype])

    def test_the_right_base_needs_no_rounding_at_all(self, tmp_path, scale, dtype):
        found = self.verdict(tmp_path, scale, dtype, "right")
        assert codes(found) == [("note", "exact")]
        assert found[0].measured == 0
        assert "base check: 0 of" in found[0].message

    def test_an_unrelated_base_does_in_a_quarter_or_more(self, tmp_path, scale, dtype):
        found = self.verdict(tmp_path, scale, dtype, "unrelated")
        assert codes(found)[0] == ("warn", "inexact")
        assert "unrelated is probably not the base that delta was made from" in found[0].message
        assert 0.2 < found[0].measured < 0.7
        assert f"{found[0].measured:.2%}" in found[0].message
        assert found[0].hint == "give the base that the delta's model card names"

    def test_the_tuned_model_itself_is_refused(self, tmp_path, scale, dtype):
        found = self.verdict(tmp_path, scale, dtype, "tuned")
        assert codes(found) == [("refuse", "tuned")]
        assert "tuned is already tuned with delta" in found[0].message
        with pytest.raises(RequirementError, match="already tuned") as error:
            raise_refusals(found)
        assert error.value.hint == "give the untouched base; --force goes on regardless"
        raise_refusals(found, force=True)

    def test_another_tuned_version_is_warned_of(self, tmp_path, scale, dtype):
        found = self.verdict(tmp_path, scale, dtype, "other-tuned")
        assert codes(found)[0] == ("warn", "inexact")
        assert "probably another version of the base, such as a tuned one" in found[0].message
        assert 0.003 < found[0].measured < 0.15


@pytest.mark.parametrize("scale", [0.002, 0.02, 0.2])
def test_a_base_rounded_to_bfloat16_is_named(tmp_path: Path, scale: float) -> None:
    found = findings(tmp_path, world(scale, F16), "rounded")
    assert codes(found) == [("warn", "bf16_rounded")]
    assert "rounded was rounded to bfloat16 and stored as float16 (100.0% of its weights" in found[0].message


def test_share_of_weights_on_the_coarse_grid(tmp_path: Path) -> None:
    """12.6 % of genuine float16 values of N(0, 0.02) have three zero low bits (simulated for the facts)."""
    states = world(0.02, F16)
    pair = checkpoint(tmp_path / "b", states["right"]), checkpoint(tmp_path / "d", states["delta"])
    assert measure(*pair, find_profile("vicuna")).matrices.bf16_share == pytest.approx(0.126, abs=0.01)


def test_half_precision_weights_in_a_float32_delta(tmp_path: Path) -> None:
    """Alpaca-type files of a model trained in half precision: the narrow grid is found and used."""
    base = weights(96, **SIZES)
    tuned = tuned_of(base)
    states = {"right": base, "unrelated": weights(96, seed=9, **SIZES), "delta": difference(tuned, base, F32)}
    assert codes(findings(tmp_path, states, "right")) == [("note", "exact")]
    assert codes(findings(tmp_path, states, "unrelated"))[0] == ("warn", "inexact")


def test_a_delta_rounded_after_it_was_made_is_warned_of_with_the_right_base(tmp_path: Path) -> None:
    """The known false positive: it is a warning, and says what else it may be."""
    states = world(0.02, F32)
    states["delta"] = {k: v.half() for k, v in states["delta"].items()}
    found = findings(tmp_path, states, "right")
    assert codes(found)[0] == ("warn", "inexact")
    assert "unless the delta was rounded after it was made" in found[0].message


def test_swapped_arguments(tmp_path: Path) -> None:
    states = world(0.05, F16)
    found = findings(tmp_path, states, "delta", "right")
    assert codes(found)[0] == ("refuse", "delta_as_base")
    assert "delta looks like a delta" in found[0].message
    assert "of its norm weights are positive" in found[0].message


def test_another_delta_as_base(tmp_path: Path) -> None:
    states = world(0.05, F16)
    states["other-delta"] = difference(states["other-tuned"], states["right"], F16)
    assert codes(findings(tmp_path, states, "other-delta"))[0] == ("refuse", "delta_as_base")


@pytest.mark.parametrize("model", ["tuned", "unrelated"])
def test_a_full_model_as_delta(tmp_path: Path, model: str) -> None:
    found = findings(tmp_path, world(0.05, F16), "right", model)
    assert codes(found)[0] == ("refuse", "model_as_delta")
    assert f"{model} looks like a full model" in found[0].message
    assert (found[0].hint or "").startswith("use it as it is")


def test_a_zero_delta(tmp_path: Path) -> None:
    states = world(0.05, F16)
    states["delta"] = {k: torch.zeros_like(v) for k, v in states["right"].items()}
    assert codes(findings(tmp_path, states, "right")) == [("warn", "zero")]


def test_norms_that_flip_and_a_far_result_are_reported_with_figures(tmp_path: Path) -> None:
    states = world(0.05, F16)
    states["wild"] = {k: (v * (0.4 if v.dim() > 1 else -1.5)).half() for k, v in weights(96, seed=4, **SIZES).items()}
    found = findings(tmp_path, states, "right", "wild")
    by_code = {f.code: f for f in found}
    assert by_code["norms"].measured == pytest.approx(1.0, abs=0.01)
    assert by_code["far"].measured == pytest.approx(0.92, abs=0.02)
    assert "correlation 0.9" in by_code["far"].message


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_values_are_rounded_as_torch_rounds_them(dtype):
    """All numbers of 16 bits of both kinds, what lies between them and a little beside the middle, and what is none."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    halves = torch.cat([every.view(F16).float(), every.view(BF16).float()])
    bits = halves.view(torch.int32)
    near = [(bits + n).view(F32) for n in (-1, 0, 1, 2**11, 2**12, 2**12 + 1, 2**15 - 1, 2**15, 2**15 + 1)]
    x = torch.cat([halves, *near])
    expected = x.to(dtype).double()
    found = torch.from_numpy(rounded(x.double().numpy(), DType.of(dtype)))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_only_a_few_megabytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.tensors.source import SourceFile

    n_bytes = []
    original = SourceFile.fill
    monkeypatch.setattr(
        SourceFile, "fill", lambda self, view, offset: (n_bytes.append(len(view)), original(self, view, offset))[1]
    )
    base = weights(4096, hidden=1024, layers=1, ffn=256)
    states = {"right": base, "delta": {k: torch.full_like(v, 2**-12) for k, v in base.items()}}
    assert findings(tmp_path, states, "right")
    total = 2 * sum(v.nbytes for v in states["right"].values())
    assert 0 < sum(n_bytes) < 0.25 * total


class TestLlmkitDeltas:
    def test_the_right_base_has_the_recorded_hashes(self, tmp_path: Path, made) -> None:
        found = check_base(open_checkpoint(tmp_path / "base"), made)
        assert codes(found) == [("note", "identical")]
        assert f"{len(made.tensors)} tensors of base have the hashes" in found[0].message

    def test_any_other_is_refused(self, tmp_path: Path, made) -> None:
        state = weights()
        state["model.norm.weight"] = state["model.norm.weight"] * 1.01
        found = check_base(checkpoint(tmp_path / "b2", state), made)
        assert codes(found) == [("refuse", "contents")]
        assert "1 of" in found[0].message
        assert "model.norm.weight" in found[0].message

    def test_without_a_manifest_it_says_so(self, tmp_path: Path, made) -> None:
        (tmp_path / "made" / "llmkit.json").unlink()
        assert codes(check_base(open_checkpoint(tmp_path / "base"), made)) == [("note", "unrecorded")]


@pytest.mark.slow
def test_smollm2(tmp_path: Path, smollm2: Path) -> None:
    """Real weights: rounded to half precision, tuned by noise of a twentieth of their size."""
    real = open_checkpoint(smollm2)
    names = [n for n in real.tensors if n.startswith(("model.layers.0.", "model.layers.29."))] + ["model.norm.weight"]
    base = {n.replace(".29.", ".1."): real.tensors[n].load().half() for n in names}
    base["model.embed_tokens.weight"] = real.tensors["model.embed_tokens.weight"].load()[:500].half()
    g = torch.Generator().manual_seed(0)
    noise = {k: 0.05 * v.float().std() * torch.randn(v.shape, generator=g) for k, v in base.items()}
    tuned = {k: (v.float() + noise[k]).half() for k, v in base.items()}
    states = {
        "right": base,
        "tuned": tuned,
        "rounded": {k: v.bfloat16().half() for k, v in base.items()},
        "delta": difference(tuned, base, F16),
    }
    assert config(base)["num_hidden_layers"] == 2
    expected = {"right": ("note", "exact"), "tuned": ("refuse", "tuned"), "rounded": ("warn", "bf16_rounded")}
    for name, code in expected.items():
        assert codes(findings(tmp_path / name, states, name))[0] == code, name


@pytest.mark.parametrize(
    ("layouts", "heads", "kv", "head_dim"),
    [
        (("meta", "hf"), 4, 2, 128),
        (("hf", "meta"), 6, 3, 96),
        (("meta", "gguf"), 2, 1, 256),
        (("gguf", "hf"), 4, 4, 96),
    ],
)
def test_whole_heads_are_sampled_in_layouts_that_turn_rotary_pairs(tmp_path, layouts, heads, kv, head_dim):
    """The rows sampled of a layout are those of the tensors in transformers' order, at borders of heads."""
    g, hidden = torch.Generator().manual_seed(0), heads * head_dim
    shapes = {"self_attn.q_proj": (heads * head_dim, hidden), "self_attn.k_proj": (kv * head_dim, hidden),
              "self_attn.v_proj": (kv * head_dim, hidden), "self_attn.o_proj": (hidden, heads * head_dim),
              "mlp.gate_proj": (256, hidden), "mlp.up_proj": (256, hidden), "mlp.down_proj": (hidden, 256)}  # fmt: skip
    base = {f"model.layers.0.{n}.weight": torch.randn(s, generator=g) for n, s in shapes.items()}
    base |= {n: torch.randn(96, hidden, generator=g) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    base |= {f"model.{n}.weight": torch.ones(hidden) for n in norms}
    sides = base, {k: torch.randn(v.shape, generator=g) * 0.01 for k, v in base.items()}
    about = {"num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": 256,
             "torch_dtype": "float32", "max_position_embeddings": 2048, "rope_theta": 10000.0}  # fmt: skip
    opened = []
    for name, state, layout in zip(("base", "delta"), sides, layouts, strict=True):
        opened.append(checkpoint(tmp_path / name, state, **about))
        if layout != "hf":
            options = {"type": "f32"} if layout == "gguf" else {}
            save(convert(opened[-1], to=layout, **options), tmp_path / f"{name}-{layout}")
            opened[-1] = open_checkpoint(tmp_path / f"{name}-{layout}")
            assert opened[-1].layout == layout
    seen = 0
    for name, mine in opened[0].tensors.items():
        theirs = opened[1].tensors[name]
        for start, stop in sampled_rows(mine, name, theirs):
            for lazy, state in zip((mine, theirs), sides, strict=True):
                assert torch.equal(Context().rows(lazy, (start, stop)), state[name][start:stop]), (name, start, stop)
                seen += (start, stop) != (0, mine.spec.n_rows)
    assert seen  # a sample is not always the whole
    assert measure(*opened, find_profile("plain")).matrices.ratio == pytest.approx(0.01, rel=0.05)
