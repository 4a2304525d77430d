"""Tensors are sorted by the natural key of their names, whatever way that is computed."""

from __future__ import annotations

import random
import re

import pytest

from llmkit.checkpoint.order import in_order, sort_tensors

STEMS = ["a", "a.b", "a.b2", "a.b10", "layers.2.mlp", "layers.10.mlp", "layers.10.mlp.gate", "layers.10.mlp_2", "z"]
LEAVES = ["weight", "bias", "7", "9" * 400, "a1\n2", "a01", "b007.w", "packed", "w2", "w10", "gate"]


def natural(name):
    """Words and numbers in turn, as lists compare; no word is before a number, and 400 digits are too many."""
    return [part if i % 2 == 0 else min(int(part), 10**300) for i, part in enumerate(re.split("([0-9]+)", name))]


@pytest.mark.parametrize("seed", range(300))
def test_names_replaced_in_place_or_anywhere_end_in_natural_order(seed):
    draw = random.Random(seed)
    names = {f"{s}.{leaf}" for s in draw.sample(STEMS, draw.randint(1, 9)) for leaf in draw.sample(LEAVES, 2)} | {"x"}
    known = sorted(names, key=natural)
    changed = []
    for name in known:
        stem, dot, _ = name.rpartition(".")
        replaced = [f"{stem}{dot}{leaf}" for leaf in sorted(draw.sample(LEAVES, 3))] if draw.random() < 0.5 else [name]
        changed += [new for new in replaced if new not in changed]
    if draw.random() < 0.2:
        draw.shuffle(changed)
    expected = sorted(changed, key=natural)
    assert list(in_order(dict.fromkeys(changed), dict.fromkeys(known))) == expected
    assert list(sort_tensors(dict.fromkeys(changed))) == expected
