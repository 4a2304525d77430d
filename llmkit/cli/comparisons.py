"""Comparisons of runs with a baseline, as `eval --compare` and `report` show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.options import GateOptions
from llmkit.cli.output import Output

if TYPE_CHECKING:
    from llmkit.evaluation.comparison import Comparison, Difference, Flips
    from llmkit.evaluation.gates import Gate
    from llmkit.evaluation.record import RunRecord


def compared(
    out: Output, records: Sequence[RunRecord], paths: Sequence[Path | None], options: GateOptions
) -> list[Comparison]:
    """The first of the records with each of the others; says what does not match.

    Args:
        paths: where the records lie, which tells apart models of one name.

    Raises:
        InputError: they did not answer the same questions.
    """
    from llmkit.evaluation.comparison import compare

    comparisons = compare(records[0], records[1:], labels_of(records, paths), common=options.common)
    for each in comparisons:
        if each.n_left_out:
            out.warning(f"{each.title}: {each.n_left_out} questions that only one of two runs has are left out")
        if each.n_other_prompts:
            out.warning(
                f"{each.title}: {each.n_other_prompts} of {each.reported.change.n} prompts have other token ids in "
                f"{each.label} than in {each.baseline}: another tokenizer, or other prompts"
            )
    return comparisons


def labels_of(records: Sequence[RunRecord], paths: Sequence[Path | None]) -> list[str]:
    """What runs are called: by their model, or by their file where two have models of one name."""
    models = [str(record.model.get("label") or "") for record in records]
    if all(models) and len(set(models)) == len(models):
        return models
    return [model if path is None else str(path) for model, path in zip(models, paths, strict=True)]


def outcome(comparisons: Sequence[Comparison], gates: Sequence[Gate]) -> dict[str, Any]:
    """What `--json` adds where runs were compared, or thresholds checked."""
    document: dict[str, Any] = {}
    if comparisons:
        document["comparisons"] = [c.to_json() for c in comparisons]
    if gates:
        document["gates"] = [{"name": g.name, "passed": g.passed, "message": g.message} for g in gates]
    return document


def render_comparisons(out: Output, comparisons: Sequence[Comparison]) -> None:
    """A table, and the comparison in a sentence, for each."""
    for i, each in enumerate(comparisons):
        if i:
            out.line()
        _render(out, each)


def _render(out: Output, c: Comparison) -> None:
    names = {"micro": "all questions", "macro": "mean of subjects", "categories": "mean of categories"}
    rows = [(f"  {name}", *_cells(part, flips)) for name, (part, flips) in (c.categories or c.subjects).items()]
    rows += [(names[k], *_cells(part, c.flips if k == "micro" else None)) for k, part in c.averages.items()]
    columns = [c.title, "n", "before", "now", "change", "95 % interval", "to wrong", "to right"]
    out.table(columns, rows, right=columns[1:])
    details = [
        f"wrong to wrong {c.flips.wrong_to_wrong}",
        f"McNemar p {c.p_value:.2g}" + (f" ({c.p_adjusted:.2g} by Holm)" if c.p_adjusted != c.p_value else ""),
        f"bootstrap {_interval(c.bootstrap)}",
    ]
    if c.kl is not None:
        details.append(f"KL of the choices {c.kl:.4g} nats")
    out.line(", ".join(details))
    out.line(c.sentence)


def _cells(part: Difference, flips: Flips | None) -> tuple[object, ...]:
    counts = ("", "") if flips is None else (flips.to_wrong, flips.to_right)
    return (
        part.change.n, f"{part.before:.4f}", f"{part.after:.4f}", f"{part.change.value:+.4f}",
        _interval(part.interval), *counts,
    )  # fmt: skip


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.4f} to {interval[1]:+.4f}"
