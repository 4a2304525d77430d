"""The table of PEFT's configurations × families: a few cells always, a diagonal of all with the slow tests.

The whole, a quarter of an hour, is a command: python tests/reliability/peft_table.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmkit.tensors.lazy import Apply
from llmkit.transforms.lora import merge
from reliability.peft_kinds import KINDS
from reliability.peft_table import FAMILIES, check

BY_NAME = {kind.name: kind for kind in KINDS}
N_DIAGONALS = 48
FEW = [
    ("mistral", "lora bfloat16"), ("phi3", "rslora"), ("gpt2", "dora float16"), ("gpt_neox", "bias all"),
    ("qwen2", "patterns by regex"), ("opt", "loha, patterns"), ("bloom", "ia3"), ("qwen3", "lokr, both"),
    ("falcon", "pissa, converted"), ("stablelm", "modules_to_save both bfloat16"), ("gptj", "adalora"),
    ("mixtral", "all-linear"), ("gpt_bigcode", "fan_in_fan_out"), ("llama", "vera"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), FEW)
def test_a_cell(family, name):
    if family not in FAMILIES:
        pytest.skip(f"this transformers has no {family}")
    cell = check(family, BY_NAME[name])
    right = {"refused"} if BY_NAME[name].is_refused else {"bits"}
    if family == "mixtral":  # a router has few rows: what BLAS gives for them differs by what else it computes
        right.add("near")
    assert cell.verdict in right, cell


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_diagonal_of_the_table(family):
    """Every forty-eighth configuration, beginning elsewhere for each family: all configurations, all families."""
    kinds = KINDS[FAMILIES.index(family) % N_DIAGONALS :: N_DIAGONALS]
    assert [cell for kind in kinds if not (cell := check(family, kind)).is_right] == []


def test_a_wrong_merge_is_found(monkeypatch):
    """The table finds a change that is a thousandth too large."""

    def folded(base, adapters):
        right = merge(base, adapters)
        name = next(n for n, t in right.tensors.items() if t.node is not base.tensors[n].node)
        old, new = base.tensors[name], right.tensors[name]
        more = Apply("more", [old, new], new.spec, lambda x, y: x + (y - x) * 1.001).output()
        return replace(right, tensors={**right.tensors, name: more})

    monkeypatch.setattr("reliability.peft_table.merge", folded)
    assert check("llama", BY_NAME["dora"]).verdict == "WRONG"
