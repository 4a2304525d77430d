"""base + (tuned - base) gives tuned back: every bit for llmkit's deltas, with limits for the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from delta_world import State, assert_same, checkpoint, loaded, tuned_of, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.api import save
from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms import delta as delta_transform
from llmkit.transforms.delta.arithmetic import combined, ordinal, ulp_added, ulp_subtracted
from llmkit.transforms.delta.roundtrip import measure_round_trip

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
INTS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Held(Read):
    """A tensor in memory that stands for a read."""

    attrs: ClassVar = {}

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.specs = (TensorSpec(DType.of(data.dtype), tuple(data.shape)),)
        self.strides = None

    def evaluate(self, rows, context):
        return (self.data[rows[0] : rows[1]],)


def held(data: torch.Tensor) -> Lazy:
    return Held(data).output()


def bits(dtype: torch.dtype) -> st.SearchStrategy[list[int]]:
    width = 16 if dtype.itemsize == 2 else 32
    return st.lists(st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1), min_size=1, max_size=64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_ulps_give_every_bit_back_whatever_the_values(dtype: torch.dtype, data: st.DataObject) -> None:
    """Subnormals, infinities, NaNs and both zeros too."""
    b, t = data.draw(bits(dtype)), data.draw(bits(dtype))
    n = min(len(b), len(t))
    base = torch.tensor(b[:n], dtype=INTS[dtype]).view(dtype)
    tuned = torch.tensor(t[:n], dtype=INTS[dtype]).view(dtype)
    difference = ulp_subtracted(held(tuned), held(base)).load()
    back = ulp_added(held(base), held(difference), DType.of(dtype)).load()
    assert torch.equal(back.view(INTS[dtype]), tuned.view(INTS[dtype]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ordinals_are_in_the_order_of_the_values(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    values, order = finite.double().sort(stable=True)
    ranks = ordinal(finite.view(torch.int16))[order].to(torch.int32)
    assert torch.equal(ranks.sort()[0], torch.arange(int(ranks.min()), int(ranks.max()) + 1, dtype=torch.int32))
    assert (ranks.diff()[values.diff() > 0] > 0).all()
    assert ordinal(torch.tensor([0.0, -0.0], dtype=dtype).view(torch.int16)).tolist() == [0, -1]


def float_round_trip(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    dtype = DType.of(tuned.dtype)
    difference = combined(-1, held(tuned), held(base), dtype, dtype).load()
    return combined(+1, held(base), held(difference), dtype, dtype).load()


@pytest.mark.parametrize(("base", "tuned", "n_ulps"), [(1.0, 1e-4, 1365), (0.5, 0.001, 62), (-60000.0, 60000.0, None)])
def test_fastchats_rule_loses_weights_that_shrink_far(base: float, tuned: float, n_ulps: int | None) -> None:
    """Counterexamples in float16, found by hand: |base| much larger than |tuned|, or an overflow."""
    b, t = torch.tensor([base]).half(), torch.tensor([tuned]).half()
    back = float_round_trip(b, t)
    if n_ulps is None:
        assert back.isinf().all()
    else:
        assert abs(int(ordinal(back.view(torch.int16))) - int(ordinal(t.view(torch.int16)))) > 10


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_published_rule_is_within_one_ulp_where_the_delta_is_at_most_twice_the_weight(dtype, data) -> None:
    """What the notes of `delta make --profile vicuna` promise. The ulp is that of the tuned weight."""
    n = 64
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scale = 2.0 ** data.draw(st.integers(-14 if dtype == torch.float16 else -100, 10))
    tuned = (torch.randn(n, generator=g) * scale).to(dtype)
    base = (tuned.double() * (torch.rand(n, generator=g) * 6 - 2)).to(dtype)
    keep = (tuned.double() - base.double()).abs() <= 2 * tuned.double().abs()
    back = float_round_trip(base, tuned)
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(tuned.double())
    ulp = torch.ldexp(torch.full((n,), info.eps, dtype=torch.float64), exponent - 1).clamp(
        min=info.smallest_normal * info.eps
    )
    assert keep.any()
    assert ((back.double() - tuned.double()).abs() <= ulp)[keep].all()


def pair(tmp_path: Path, base: State, tuned: State, **extra) -> tuple[Checkpoint, Checkpoint]:
    return checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "tuned", tuned, **extra)


class TestLlmkitProfile:
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_through_disk_every_bit_comes_back(self, tmp_path: Path, dtype: torch.dtype) -> None:
        base = weights(96)
        tuned = tuned_of(base, dtype=dtype)
        tuned["lm_head.weight"] = torch.cat([tuned["lm_head.weight"], torch.ones(2, 64, dtype=dtype)])
        tuned["model.embed_tokens.weight"] = torch.cat(
            [tuned["model.embed_tokens.weight"], torch.ones(2, 64, dtype=dtype)]
        )
        b, t = pair(tmp_path, base, tuned, torch_dtype=str(dtype).removeprefix("torch."))
        made = delta_transform.make(b, t)
        assert made.nbytes == t.nbytes
        assert "every bit" in made.notes[-1]
        save(made, tmp_path / "delta")
        back = delta_transform.apply(b, open_checkpoint(tmp_path / "delta"))
        assert_same(loaded(back), tuned)
        assert dict(back.config) == dict(t.config)
        assert "llmkit_delta.json" not in back.files
        assert "profile llmkit (detected: it carries llmkit_delta.json)" in back.notes[-1] + back.notes[0]

    def test_names_and_shapes_of_one_side_only(self, tmp_path: Path) -> None:
        base, tuned = weights(96), tuned_of(weights(96))
        base["model.extra.weight"] = torch.ones(3).half()
        tuned["model.new.weight"] = torch.ones(4).half()
        tuned["counter"] = torch.arange(3)
        b, t = pair(tmp_path, base, tuned)
        made = delta_transform.make(b, t)
        assert any("2 tensors are stored whole" in n for n in made.notes)
        assert any("not in the tuned model: model.extra.weight" in n for n in made.notes)
        save(made, tmp_path / "delta", force=True)
        assert_same(loaded(delta_transform.apply(b, open_checkpoint(tmp_path / "delta"))), tuned)

    def test_a_small_change_makes_small_numbers(self, tmp_path: Path) -> None:
        base = weights()
        made = delta_transform.make(*pair(tmp_path, base, tuned_of(base, scale=1e-3)))
        ulps = made.tensors["model.layers.0.mlp.up_proj.weight"].load()
        assert ulps.dtype == torch.int16
        assert ulps.abs().float().median() <= 4

    def test_dtype_of_the_result(self, tmp_path: Path) -> None:
        base, tuned = weights(), tuned_of(weights())
        b, t = pair(tmp_path, base, tuned)
        save(delta_transform.make(b, t), tmp_path / "delta")
        back = delta_transform.apply(b, open_checkpoint(tmp_path / "delta"), dtype="float32")
        assert_same(loaded(back), {k: v.float() for k, v in tuned.items()})

    def test_a_dtype_for_the_delta_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RequirementError, match="count ulps") as error:
            delta_transform.make(*pair(tmp_path, weights(), weights()), dtype="float32")
        assert "--profile vicuna" in (error.value.hint or "")

    def test_force_cannot_read_it_as_another_profile(self, tmp_path: Path) -> None:
        b, t = pair(tmp_path, weights(), tuned_of(weights()))
        save(delta_transform.make(b, t), tmp_path / "delta")
        with pytest.raises(RequirementError, match="profile vicuna cannot read it"):
            delta_transform.apply(b, open_checkpoint(tmp_path / "delta"), profile="vicuna")
        with pytest.raises(InputError, match=r"tuned has no llmkit_delta.json"):
            delta_transform.apply(b, t, profile="llmkit")

    def test_a_later_format_is_refused(self, tmp_path: Path) -> None:
        b, t = pair(tmp_path, weights(), tuned_of(weights()))
        out = tmp_path / "delta"
        save(delta_transform.make(b, t), out)
        marker = out / "llmkit_delta.json"
        marker.write_text(marker.read_text().replace('"format": 1', '"format": 2'))
        with pytest.raises(InputError, match="format 2, arithmetic 'ulp'; expected 1"):
            delta_transform.apply(b, open_checkpoint(out))


@pytest.mark.parametrize("profile", ["alpaca", "vicuna", "plain"])
def test_published_profiles_measure_what_comes_back(tmp_path: Path, profile: str) -> None:
    dtype = torch.float32 if profile == "alpaca" else torch.float16
    base = tuned_of(weights(), scale=1e-3, dtype=dtype)
    tuned = tuned_of(base, scale=0.5, dtype=dtype)
    b, t = pair(tmp_path, base, tuned)
    made = delta_transform.make(b, t, profile=profile)
    back = delta_transform.apply(b, made, profile=profile)
    found = measure_round_trip(t, back)
    both = loaded(back)
    diffs = torch.cat([
        (ordinal(both[k].view(INTS[v.dtype])).long() - ordinal(v.view(INTS[v.dtype])).long()).abs().flatten()
        for k, v in tuned.items()
    ])  # fmt: skip
    diffs[torch.cat([(both[k] == v).flatten() for k, v in tuned.items()])] = 0  # both zeros are zero
    assert found.n == diffs.numel()
    assert found.n_exact == int((diffs == 0).sum())
    assert found.n_beyond == int((diffs > 1).sum())
    assert found.worst_ulps == int(diffs.max())
    assert 0.8 * found.n < found.n_exact < found.n
    assert f"{found.n_beyond}" in found.describe()


def test_shapes_without_a_rule(tmp_path: Path) -> None:
    base, delta = weights(), weights(seed=3)
    delta["model.layers.0.mlp.up_proj.weight"] = delta["model.layers.0.mlp.up_proj.weight"][:90]
    b, d = pair(tmp_path, base, delta)
    with pytest.raises(SpecError, match=r"up_proj.weight: base has F16\[96, 64\], tuned F16\[90, 64\]") as error:
        delta_transform.apply(b, d)
    assert "force another --profile" in (error.value.hint or "")
