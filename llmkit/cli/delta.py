"""`llmkit delta apply|make`: weight deltas, by the published conventions (`xor|decrypt`: `llmkit.cli.decode`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli import completion, decode
from llmkit.cli.command import command
from llmkit.cli.options import OutDtypeOption, Writing
from llmkit.cli.output import Output
from llmkit.cli.writing import write

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.transforms.delta.base_structure import Finding

__all__ = ["register"]

BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help="The model that the delta was made from.")]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME",
        autocompletion=completion.profiles,
        help="The convention: alpaca, vicuna, vicuna-v0, … (default: found out, and said).",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Apply and make weight deltas; decode XOR and encrypted releases.", no_args_is_help=True)
    command(
        group,
        "apply",
        examples=[
            "llmkit delta apply llama-7b vicuna-7b-delta-v1.1 -o vicuna-7b",
            "llmkit delta apply llama-7b alpaca-7b-wdiff -o alpaca-7b --dry-run",
            "llmkit delta apply llama-7b some-delta --profile vicuna-v0 -o out",
        ],
    )(apply)
    command(
        group,
        "make",
        examples=[
            "llmkit delta make llama-7b my-tuned-7b -o my-delta",
            "llmkit delta make llama-7b my-tuned-7b --profile vicuna -o my-delta",
        ],
    )(make)
    decode.register(group)
    app.add_typer(group, name="delta")


def apply(
    out: Output,
    base: BaseArgument,
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="The published difference.")],
    writing: Writing,
    profile: ProfileOption = None,
    dtype: OutDtypeOption = None,
    expected_sum: Annotated[
        float | None,
        typer.Option("--expected-sum", metavar="X", help="The sum of all weights that the release states."),
    ] = None,
) -> None:
    """Add a delta to its base, bit for bit as the published script does.

    The convention is found out and named in the plan. The wrong base is refused where that is certain, and warned of
    with the measured figure where only statistics can tell.
    """
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.transforms import delta as deltas

    decode.refuse_coded(base, delta)
    first, second = open_checkpoint(base), open_checkpoint(delta)
    result = deltas.apply(first, second, profile=profile, dtype=dtype, expected_sum=expected_sum, force=writing.force)
    findings = _sampled(first, second, profile, force=writing.force)
    result = result.derive(notes=_worded(findings, "note"), warnings=_worded(findings, "warn", "refuse"))
    expected = _expected(result)
    if not expected:
        write(out, result, writing, finish=_findings_document(findings))
        return
    from llmkit.transforms.delta.checksum import ChecksumMeter, judge_sum

    meter = ChecksumMeter()

    def finish(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        document, _ = _findings_document(findings)(manifest)
        if manifest.get("run", {}).get("steps_resumed"):
            text = "the sum of all weights was not compared: an interrupted run had written a part of them"
            return document | {"checksum": None}, lambda: out.line(text)
        verdict = judge_sum(meter.total, expected)
        return document | {"checksum": asdict(verdict)}, lambda: _show(out, verdict)

    write(out, result, writing, observe=meter.update, finish=finish)


def make(
    out: Output,
    base: BaseArgument,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model that the delta shall give.")],
    writing: Writing,
    profile: ProfileOption = None,
    dtype: OutDtypeOption = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not count what comes back.")] = False,
) -> None:
    """Make the delta from a base to a tuned model, and count what comes back when it is applied.

    By default it counts units in the last place, so that applying it gives every bit of the tuned model back. With
    the profile of a published convention it is what that script makes, with its rounding.
    """
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.transforms import delta as deltas

    first, second = open_checkpoint(base), open_checkpoint(tuned)
    result = deltas.make(first, second, profile=profile, dtype=dtype, force=writing.force)
    if no_check:
        write(out, result, writing)
        return
    from llmkit.transforms.delta.detect import main_dtype
    from llmkit.transforms.delta.roundtrip import measure_round_trip

    def finish(_manifest: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        stored = None if profile in (None, "llmkit") else main_dtype(second)
        back = deltas.apply(first, open_checkpoint(writing.output), profile=profile, dtype=stored, force=True)
        found = measure_round_trip(second, back)
        say = out.line if found.is_within_one_ulp else out.warning
        return {"round_trip": asdict(found)}, lambda: say(f"applied to its base again: {found.describe()}")

    write(out, result, writing, finish=finish)


def _sampled(base: Checkpoint, delta: Checkpoint, profile: str | None, *, force: bool) -> list[Finding]:
    from llmkit.tensors.loading import import_torch
    from llmkit.transforms.delta.base_check import check_base
    from llmkit.transforms.delta.base_structure import raise_refusals

    import_torch()
    findings = check_base(base, delta, profile=profile)
    raise_refusals(findings, force=force)
    return findings


def _worded(findings: Iterable[Finding], *levels: str) -> list[str]:
    return [
        ("forced: " if f.level == "refuse" else "") + f.message + (f" ({f.hint})" if f.hint else "")
        for f in findings
        if f.level in levels
    ]


def _expected(result: Checkpoint) -> list[Any]:
    from llmkit.transforms.delta.checksum import ExpectedSum

    last = result.history[-1] if result.history else {}
    return [ExpectedSum(**entry) for entry in last.get("expected_sums", ())]


def _findings_document(
    findings: list[Finding],
) -> Callable[[Mapping[str, Any]], tuple[dict[str, Any], Callable[[], None]]]:
    return lambda _manifest: ({"base_check": [asdict(f) for f in findings]}, lambda: None)


def _show(out: Output, verdict: Finding) -> None:
    if verdict.level == "note":
        out.line(verdict.message)
    else:
        out.warning(verdict.message + (f" ({verdict.hint})" if verdict.hint else ""))
