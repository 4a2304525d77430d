"""`llmkit delta apply|make`: weight deltas, by the published conventions (`xor|decrypt`: `llmkit.cli.decode`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.decode import refuse_coded
from llmkit.cli.options import OutDtypeOption, WriteOptions
from llmkit.cli.output import Output
from llmkit.cli.writing import Addition, write

BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help="The model that the delta is a difference from.")]


def _profile(default: str) -> Any:
    return typer.Option(
        "--profile",
        metavar="NAME",
        autocompletion=completion.profiles,
        help=f"The convention: alpaca, vicuna, vicuna-v0, … (default: {default}).",
    )


@command(
    "llmkit delta apply llama-7b vicuna-7b-delta-v1.1 -o vicuna-7b",
    "llmkit delta apply llama-7b alpaca-7b-wdiff -o alpaca-7b --dry-run",
    "llmkit delta apply llama-7b some-delta --profile vicuna-v0 -o out",
)
def apply(
    out: Output,
    base: BaseArgument,
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="The published difference.")],
    writing: WriteOptions,
    profile: Annotated[str | None, _profile("detected, and named in the plan")] = None,
    dtype: OutDtypeOption = None,
    expected_sum: Annotated[
        float | None, typer.Option(metavar="X", help="The sum of all weights that the release states.")
    ] = None,
) -> None:
    """Add a delta to its base, bit for bit as the published script does.

    The wrong base is refused where that is certain, and warned of with the measured figure where only statistics can
    tell. Exit code 1 when the sum of all weights is not that of --expected-sum.
    """
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.checkpoint.classification import open_model
    from llmkit.transforms import delta as deltas
    from llmkit.transforms.delta.base_check import check_base
    from llmkit.transforms.delta.base_structure import Finding, raise_refusals
    from llmkit.transforms.delta.checksum import ChecksumMeter, ExpectedSum, judge_sum

    refuse_coded(delta, ", not a delta of weights", base, delta)
    refuse_coded(base, ", not a base model: the base comes first", delta, base)
    first, second = open_model(base, force=writing.force), open_checkpoint(delta)
    result = deltas.apply(first, second, profile=profile, dtype=dtype, expected_sum=expected_sum, force=writing.force)
    findings = check_base(first, second, profile=profile)
    raise_refusals(findings, force=writing.force)
    result = result.derive(
        notes=[f.words for f in findings if f.level == "note"],
        warnings=[f.words for f in findings if f.level != "note"],
    )
    stated = result.history[-1].get("expected_sums", ()) if result.history else ()
    expected = [ExpectedSum(**entry) for entry in stated]
    meter = ChecksumMeter()
    missed: list[Finding] = []

    def finish(manifest: Mapping[str, Any]) -> Addition:
        document: dict[str, Any] = {"base_check": [asdict(f) for f in findings]}
        if not expected:
            return document, lambda: None
        if manifest.get("run", {}).get("steps_resumed"):
            text = "the sum of all weights was not compared: an interrupted run had written a part of them"
            return document | {"checksum": None}, lambda: out.line(text)
        verdict = judge_sum(meter.total, expected)
        if expected_sum is not None and verdict.level != "note":
            missed.append(verdict)
            return document | {"checksum": asdict(verdict)}, lambda: None
        say = out.line if verdict.level == "note" else out.warning
        return document | {"checksum": asdict(verdict)}, lambda: say(verdict.words)

    write(out, result, writing, observe=meter.update if expected else None, finish=finish)
    for verdict in missed:
        out.refuse(verdict.message, verdict.hint)


@command(
    "llmkit delta make llama-7b my-tuned-7b -o my-delta",
    "llmkit delta make llama-7b my-tuned-7b --profile vicuna -o my-delta",
)
def make(
    out: Output,
    base: BaseArgument,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model that the delta shall give.")],
    writing: WriteOptions,
    profile: Annotated[str | None, _profile("llmkit, units in the last place")] = None,
    dtype: OutDtypeOption = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not count what comes back.")] = False,
) -> None:
    """Make the delta from a base to a tuned model, and count what comes back when it is applied.

    Differences in units in the last place give every bit of the tuned model back. With the profile of a published
    convention the delta is what that script makes, with its rounding.
    """
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.checkpoint.classification import open_model
    from llmkit.transforms import delta as deltas

    first, second = (open_model(m, force=writing.force) for m in (base, tuned))
    result = deltas.make(first, second, profile=profile, dtype=dtype, force=writing.force)
    if no_check:
        write(out, result, writing)
        return
    from llmkit.transforms.delta.detect import main_dtype
    from llmkit.transforms.delta.roundtrip import measure_round_trip

    def finish(_manifest: Mapping[str, Any]) -> Addition:
        stored = None if profile in (None, "llmkit") else main_dtype(second)
        back = deltas.apply(first, open_checkpoint(writing.output), profile=profile, dtype=stored, force=True)
        trip = measure_round_trip(second, back)
        say = out.line if trip.is_within_one_ulp else out.warning
        return {"round_trip": asdict(trip)}, lambda: say(f"applied to its base again: {trip.describe()}")

    write(out, result, writing, finish=finish)
