"""Errors of a quantization by layer and matrix, as a heat map and a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite
from statistics import median

from llmkit.report.setting import number
from llmkit.report.svg import Cell, heat_strip
from llmkit.report.table import PlotRow, Table

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, slots=True)
class ErrorMap:
    """The errors of one checkpoint: a row for each matrix of a layer, a column for each layer."""

    title: str
    words: str
    first: int
    last: int
    rows: Sequence[PlotRow]
    table: Table


def error_map(title: str, errors: Mapping[str, float]) -> ErrorMap | None:
    """The errors of weights by name; None if no name has a layer number.

    The experts of a layer share a cell, which shows their mean.
    """
    by_role: dict[str, dict[int, list[float]]] = {}
    for name, error in errors.items():
        if (found := _LAYER.search(name)) and isfinite(error):
            role = re.sub(r"\.\d+\.", ".*.", name[found.end() :].removesuffix(".weight"))
            by_role.setdefault(role, {}).setdefault(int(found[1]), []).append(error)
    if not by_role:
        return None
    means = {role: {n: fsum(v) / len(v) for n, v in layers.items()} for role, layers in by_role.items()}
    everything = [e for layers in means.values() for e in layers.values()]
    low, high = min(everything), max(everything)
    numbers = sorted({n for layers in means.values() for n in layers})
    first, last = numbers[0], numbers[-1]
    rows = []
    for role, layers in means.items():
        cells = [_cell(role, n, layers, low, high) for n in range(first, last + 1)]
        rows.append(PlotRow(role, "", False, (), heat_strip(cells, _summary(role, layers))))
    caption = "Relative error ‖W − Ŵ‖ / ‖W‖ of each matrix over the layers"
    columns = ("matrix", "smallest", "median", "largest", "in layer")
    table = Table(caption, columns, [_row(role, layers) for role, layers in means.items()])
    words = f"Relative error of each quantized weight, from {number(low)} (lightest) to {number(high)} (darkest)."
    return ErrorMap(title, words, first, last, rows, table)


def _cell(role: str, layer: int, errors: Mapping[int, float], low: float, high: float) -> Cell | None:
    if layer not in errors:
        return None
    share = (errors[layer] - low) / (high - low) if high > low else 0.5
    return Cell(share, f"layer {layer}, {role}: {number(errors[layer])}")


def _summary(role: str, errors: Mapping[int, float]) -> str:
    low, high = number(min(errors.values())), number(max(errors.values()))
    return f"{role}: errors from {low} to {high} over {len(errors)} layers"


def _row(role: str, errors: Mapping[int, float]) -> tuple[str, ...]:
    worst = max(errors, key=lambda n: errors[n])
    figures = (min(errors.values()), median(errors.values()), errors[worst])
    return (role, *map(number, figures), str(worst))
