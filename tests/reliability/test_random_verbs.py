"""Every verb on a random config of some families. All: python -m tests.reliability.random_verbs."""

from __future__ import annotations

import pytest

from reliability.random_verbs import VERBS, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "granitemoehybrid", "mamba", "qwen3_moe", "rwkv7"])
def test_verbs_on_random_configs(name):
    ((_, found),) = outcomes(name, 1, 5, [*VERBS])
    assert [o for o in found if o.verdict == "WRONG"] == []
    assert sum(o.verdict == "equal" for o in found) >= 6


def test_a_verb_that_changes_the_model_is_found(monkeypatch):
    monkeypatch.setitem(VERBS, "merge", lambda case: float((case.logits * 1.01 - case.logits).abs().max()))
    ((_, (found,)),) = outcomes("llama", 1, 0, ["merge"])
    assert found.verdict == "WRONG"
