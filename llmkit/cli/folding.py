"""Names that differ in numbers alone, such as those of a model's layers, shown as one line."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<![^./])\d+(?![^./])")  # a whole part of a name: that of a layer or an expert, not w1's


def fold_lines(entries: Iterable[tuple[str, str]]) -> list[str]:
    """Names with what follows them, one a line; names that differ in their numbers alone share a line.

    Those that are alike but for their numbers share a line: `layers.N.mlp.up_proj.weight  F32  (N = 0..31)`.

    Args:
        entries: name, and what follows it in its line.
    """
    groups: dict[tuple[str, str], list[tuple[str, list[str]]]] = {}
    for name, rest in entries:
        groups.setdefault((_NUMBER.sub("N", name), rest), []).append((name, _NUMBER.findall(name)))
    lines = []
    for (pattern, rest), members in groups.items():
        if len(members) == 1:
            lines.append(members[0][0] + rest)
            continue
        firsts = sorted({int(numbers[0]) for _, numbers in members if numbers})
        is_range = len(members) == len(firsts) == firsts[-1] - firsts[0] + 1 if firsts else False
        count = "" if is_range else f", {len(members)} tensors"
        lines.append(f"{pattern}{rest}  (N = {firsts[0]}..{firsts[-1]}{count})" if firsts else pattern + rest)
    return lines
