"""Which profile is found from names, shapes, dtypes and small files; what the sum of all weights says."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from delta_world import checkpoint, weights

from llmkit.errors import RequirementError
from llmkit.transforms import delta as delta_transform
from llmkit.transforms.delta.checksum import ChecksumMeter, ExpectedSum, expected_sums, inv_freq_sum, judge_sum
from llmkit.transforms.delta.detect import detect
from llmkit.transforms.delta.profiles import PROFILES, find_profile

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("label", "dtype", "rows", "names", "files", "expected"),
    [
        ("alpaca-7b-wdiff", F32, 97, {}, {}, "alpaca"),
        ("wizard-7b", F32, 97, {}, {}, "wizardlm"),
        ("tulu-7b-diff", F32, 97, {}, {}, "tulu"),
        ("gist-pos-control", F32, 97, {}, {}, "gist"),
        ("zhixi-13b-diff", F32, 97, {}, {}, "knowlm"),
        ("alpaca-farm-sft10k-wdiff", F32, 97, {}, {}, "alpaca-farm"),
        ("sft10k", F32, 97, {}, {"model_sum.txt": "1.0"}, "alpaca-farm"),
        ("reward", F32, 97, {"backbone_model.x": 1}, {}, "alpaca-farm"),
        ("vicuna-7b-delta-v0", F16, 97, {}, {}, "vicuna-v0"),
        ("stable-vicuna-13b-delta", BF16, 97, {}, {}, "vicuna-v0"),
        ("vicuna-7b-delta-v1.1", F16, 96, {}, {}, "vicuna"),
        ("something", BF16, 96, {}, {}, "plain"),
        ("something", F32, 96, {}, {}, "plain"),
        ("llava-delta", F16, 99, {"model.mm_projector.weight": 1}, {}, "llava"),
        ("llava-delta", F16, 96, {"model.mm_projector.bias": 1}, {}, "llava"),
        ("ziya", F16, 39424, {}, {}, "ziya"),
        ("billa-7b-llm", F16, 196, {}, {}, "billa"),
    ],
)
def test_table(tmp_path: Path, label, dtype, rows, names, files, expected) -> None:
    state = weights(rows, dtype=dtype, hidden=8, layers=1, ffn=8) | {n: torch.ones(2, dtype=dtype) for n in names}
    delta = checkpoint(tmp_path / label, state, files)
    found = detect(checkpoint(tmp_path / "base", weights(96, hidden=8, layers=1, ffn=8)), delta)
    assert found.name == expected
    assert found.reason


def test_a_grown_vocabulary_is_ambiguous_and_says_what_it_may_be(tmp_path: Path) -> None:
    pair = checkpoint(tmp_path / "base", weights(96)), checkpoint(tmp_path / "d", weights(196, seed=3))
    with pytest.raises(RequirementError, match="float16, 196 embedding rows over the base's 96") as error:
        delta_transform.apply(*pair)
    assert all(f"--profile {name}" in (error.value.hint or "") for name in ("ziya", "llava", "alpaca"))
    ziya = delta_transform.apply(*pair, profile="ziya").tensors["lm_head.weight"].load()
    llava = delta_transform.apply(*pair, profile="llava").tensors["lm_head.weight"].load()
    assert not torch.equal(ziya[:96], llava[:96])
    assert torch.equal(ziya[96:], llava[96:])


def test_the_layout_of_the_original_files_is_refused_by_name(tmp_path: Path) -> None:
    meta = {
        "tok_embeddings.weight": torch.ones(96, 64).half(),
        "layers.0.attention.wq.weight": torch.ones(64, 64).half(),
    }
    base = checkpoint(tmp_path / "base", weights(96, layers=1))
    delta = checkpoint(tmp_path / "d", {f"x.{k}": v for k, v in weights(8, layers=1).items()})
    delta = delta.derive(tensors=checkpoint(tmp_path / "m", meta | weights(8, layers=1)).tensors)
    delta = delta.derive(tensors={k: v for k, v in delta.tensors.items() if k in meta})
    with pytest.raises(RequirementError, match=r"in the layout of the original \.pth files") as error:
        detect(base, delta)
    assert error.value.hint == "give both in the same layout"


def test_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(RequirementError, match="unknown delta profile 'vicuna-v1'") as error:
        find_profile("vicuna-v1")
    assert (error.value.hint or "").startswith("did you mean vicuna")


def test_profiles_have_names_of_their_own() -> None:
    assert len({p.name for p in PROFILES}) == len(PROFILES)
    assert all(p.releases and p.tokenizer in ("delta", "base") for p in PROFILES)


class TestChecksum:
    def test_rotary_tables_of_the_published_sizes(self) -> None:
        """Per layer 7.459954: x 32 = 238.7185, x 40 = 298.3982 (facts, from transformers' formula)."""
        config = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
        table = 1.0 / (10000.0 ** (torch.arange(0, 128, 2).float() / 128))
        assert inv_freq_sum(config) == pytest.approx(32 * table.double().sum().item(), abs=1e-4)
        assert inv_freq_sum(config) == pytest.approx(238.7185, abs=5e-5)
        assert inv_freq_sum(config | {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40}) == (
            pytest.approx(298.3982, abs=5e-5)
        )
        assert inv_freq_sum({}) is None

    def test_total_is_the_same_in_any_order_and_slicing(self) -> None:
        state = {k: v.float() for k, v in weights(96).items()} | {"ids": torch.arange(4)}
        exact = math.fsum(itertools.chain.from_iterable(v.double().flatten().tolist() for v in state.values())) - 6
        totals = []
        for step, reverse in ((1000, False), (7, True), (32, False)):
            meter = ChecksumMeter()
            slices = [(k, i, v[i : i + step]) for k, v in state.items() for i in range(0, len(v), step)]
            for name, start, data in reversed(slices) if reverse else slices:
                meter.update(name, start, data)
                meter.update(name, start, data)  # a slice written again after a resume counts once
            totals.append(meter.total)
        assert totals[0] == pytest.approx(exact, abs=1e-9)
        assert totals[1:] == pytest.approx(totals[:1] * 2, abs=1e-12)

    def test_workers_do_not_change_the_total(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        state = weights(96)
        meters = [ChecksumMeter(), ChecksumMeter()]
        for meter, n in zip(meters, (1, 4), strict=True):
            with ThreadPoolExecutor(n) as pool:
                list(pool.map(lambda item, m=meter: m.update(item[0], 0, item[1]), state.items()))
        assert meters[0].total == meters[1].total

    SUMS = (ExpectedSum("with", 50637.1836, 1e-2), ExpectedSum("without", 50398.4651, 2e-2))

    @pytest.mark.parametrize(
        ("total", "level", "words"),
        [
            (50637.1840, "note", "matches 50637.1836 (with)"),
            (50398.4567, "note", "matches 50398.4651 (without)"),
            (50400.1, "warn", "a base rounded to bfloat16 is suspected"),
            (50634.0, "warn", "misses 50637.1836 (with) by -3.1836: a base rounded"),
            (12000.0, "warn", "misses 50398.4651 (without) by -38398.4651"),
        ],
    )
    def test_verdicts(self, total: float, level: str, words: str) -> None:
        finding = judge_sum(total, self.SUMS)
        assert finding.level == level
        assert words in finding.message
        assert finding.measured == total
        assert ("bfloat16" in finding.message) == ("bfloat16" in words or "rounded" in words)

    def test_expected_sums_only_where_they_mean_something(self, tmp_path: Path) -> None:
        delta = checkpoint(tmp_path / "d", weights(97, dtype=F32))
        assert expected_sums("alpaca", delta, delta.tensors) == ()
        with_sum = expected_sums("wizardlm", delta, delta.tensors, 100.0)
        tables = inv_freq_sum(delta.config)
        assert [s.value for s in with_sum] == [100.0, 100.0 - (tables or 0)]

    def test_alpaca_7b_is_known_by_its_size(self, tmp_path: Path) -> None:
        from llmkit.tensors.lazy import Apply
        from llmkit.tensors.spec import DType, TensorSpec

        delta = checkpoint(tmp_path / "d", weights(97, dtype=F32))
        rows, hidden, ffn, layers = 32001, 4096, 11008, 32
        numel = 2 * rows * hidden + layers * (4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden) + hidden
        lazy = Apply("zeros", [], TensorSpec(DType.F32, (numel,)), lambda: torch.zeros(numel), row_step=None).output()
        values = [s.value for s in expected_sums("alpaca", delta, {"all": lazy})]
        assert values == [50637.1836, 50398.4651]
