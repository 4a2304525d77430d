"""Small CSV files of the benchmarks, in their published forms."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

SUBJECTS = {
    "mmlu": ("virology", "anatomy"),
    "ceval": ("law", "logic"),
    "cmmlu": ("logical", "arts"),
    "mini": ("a", "b"),
}
HEADERS = {"ceval": ["id", "question", *"ABCD", "answer", "explanation"], "cmmlu": ["", "Question", *"ABCD", "Answer"]}


def write_benchmarks(root: Path, splits: Callable[[str], Sequence[str]]) -> Path:
    """Three questions for each subject of each split of a benchmark; the folder."""
    for bench, subjects in SUBJECTS.items():
        for split in splits(bench):
            for subject in subjects:
                path = root / bench / split / (f"{subject}.csv" if bench == "cmmlu" else f"{subject}_{split}.csv")
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = [[f"{subject} {split} {i}?", "apple", "stone", "None", "river", "ABCD"[i]] for i in range(3)]
                rows = rows if bench not in HEADERS else [[str(i), *row] for i, row in enumerate(rows)]
                rows = [[*row, "1. 理由"] for row in rows] if bench == "ceval" else rows
                with path.open("w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows(([HEADERS[bench]] if bench in HEADERS else []) + rows)
    return root
