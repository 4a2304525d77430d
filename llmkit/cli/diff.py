"""`llmkit diff`: how two models differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from typing import Annotated, Any

import typer

from llmkit.cli.command import command
from llmkit.cli.folding import fold_lines
from llmkit.cli.output import Output
from llmkit.errors import counted

_MOST_CONFIG_KEYS = 12


@command("llmkit diff llama-7b vicuna-7b", "llmkit diff vicuna-7b vicuna-7b-int8 --tol 0.02 --top 20")
def diff(
    out: Output,
    a: Annotated[str, typer.Argument(metavar="A", help="The model that is compared with.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model that is compared.")],
    tol: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="The largest absolute difference that counts as none.")
    ] = 0.0,
    top: Annotated[int, typer.Option(metavar="N", min=0, help="Show the N worst tensors.")] = 10,
) -> None:
    """Compare two models, tensor by tensor, worst first.

    Says first whether the architectures differ; shows what was added, removed and reshaped, with layers folded, then
    the largest absolute difference, the relative L2 distance and the cosine of each tensor. Quantized models are
    compared by the floats they stand for. Exit code 1 when names, shapes or values beyond --tol differ; other dtypes,
    config keys, files and buffers that the model does without are shown and do not count.
    """
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.inspection.comparison import compare

    comparison = compare(open_checkpoint(a), open_checkpoint(b), progress=out.progress())
    is_same = comparison.is_same(tol)
    beyond = comparison.beyond(tol)
    document = {"a": a, "b": b, "tol": tol, "same": is_same, "n_beyond": len(beyond), **asdict(comparison)}
    document["differences"] = [asdict(d) for d in comparison.differences]
    out.answer(document, lambda: _render(out, document, top), brief="same" if is_same else "different")
    if not is_same:
        parts = [
            f"{len(values)} {word}"
            for word, values in (
                ("tensors removed", comparison.removed),
                ("added", comparison.added),
                ("reshaped", comparison.reshaped),
                (f"beyond a tolerance of {tol:g}" if tol else "with other values", beyond),
            )
            if values
        ]
        out.refuse(f"{b} differs from {a}: {', '.join(parts)}")


def _render(out: Output, d: Mapping[str, Any], top: int) -> None:
    if d["is_dequantized"]:
        out.line("quantized weights are compared by the floats they stand for\n")
    if d["architectures"]:
        out.line(f"the architectures differ: {' → '.join(d['architectures'])}\n")
    for word in ("removed", "added", "unneeded"):
        for line in fold_lines((name, "") for name in d[word]):
            out.line(f"{word:<9} {line}")
    for line in fold_lines(
        (name, f": {list(before)} → {list(after)}") for name, (before, after) in d["reshaped"].items()
    ):
        out.line(f"{'reshaped':<9} {line}")
    retyped: dict[tuple[str, str], int] = {}
    for pair in d["retyped"].values():
        retyped[tuple(pair)] = retyped.get(tuple(pair), 0) + 1
    for (before, after), n in retyped.items():
        out.line(f"{'retyped':<9} {counted(n, 'tensor')}: {before} → {after}")
    for key, (before, after) in list(d["config"].items())[:_MOST_CONFIG_KEYS]:
        out.line(f"{'config':<9} {key}: {_short(before)} → {_short(after)}")
    if len(d["config"]) > _MOST_CONFIG_KEYS:
        out.line(f"{'config':<9} and {len(d['config']) - _MOST_CONFIG_KEYS} more keys (--json shows all)")
    for name in d["files"]:
        out.line(f"{'file':<9} {name}")
    changed = [x for x in d["differences"] if x["n_changed"]]
    same = len(d["differences"]) - len(changed)
    out.line(f"{counted(len(d['differences']), 'tensor')} compared, {same} equal, {len(changed)} with other values")
    if changed and top:
        out.line()
        out.table(
            ["tensor", "max |b-a|", "relative L2", "cosine", "changed"],
            [
                (
                    x["name"],
                    f"{x['max_abs']:.3g}",
                    f"{x['relative_l2']:.3g}",
                    "" if x["cosine"] is None else f"{x['cosine']:.6f}",
                    f"{x['n_changed'] / max(prod(x['shape']), 1):.1%}",
                )
                for x in changed[:top]
            ],
            right=["max |b-a|", "relative L2", "cosine", "changed"],
        )
        if len(changed) > top:
            out.line(f"… and {len(changed) - top} more (--top, or --json for all)")


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
