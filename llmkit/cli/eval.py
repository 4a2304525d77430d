"""`llmkit eval`: score a model on benchmarks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.comparisons import compared, outcome, render_comparisons
from llmkit.cli.gating import gates_of
from llmkit.cli.interrupts import Interrupted, interruptible
from llmkit.cli.options import ChatOptions, ComputeOptions, GateOptions, JsonPath, ModelArgument, ScalingOptions
from llmkit.cli.output import Output
from llmkit.cli.prompts_shown import show_prompts
from llmkit.cli.scores import render_record
from llmkit.errors import InputError
from llmkit.formats.paths import expanded
from llmkit.tensors.spec import parse_bytes

if TYPE_CHECKING:
    from llmkit.evaluation.planning import Selection
    from llmkit.evaluation.shards import Shard


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """What of the benchmarks is scored."""

    title: ClassVar = "Questions and prompts"
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The published CSV files, or a task's data set (default: from the hub)."),
    ] = None
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Task definitions of your own, in lm-eval's YAML.")
    ] = None
    split: Annotated[
        str | None,
        typer.Option(metavar="val|test|dev", help="The split to score (default: the benchmark's usual one)."),
    ] = None
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.protocols,
            help="How questions are put and answers read: lm-eval, or as published (mmlu: original, …).",
        ),
    ] = "lm-eval"
    shots: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Examples in each prompt (default: the usual number).")
    ] = None
    limit: Annotated[
        float | None,
        typer.Option(metavar="N", min=0, help="Only the first N questions of each subject; below 1 a share."),
    ] = None
    subjects: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            autocompletion=completion.subjects,
            help="Only these subjects, categories or subsets.",
        ),
    ] = None
    max_length: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="The longest prompt (default: the model's).")
    ] = None
    submission: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the answers as the leaderboard takes them (ceval, --split test)."),
    ] = None

    def selection(self, bench: str, templates: ChatOptions) -> Selection:
        """The same as an argument of `runner.evaluate`.

        Raises:
            InputError: `--subjects` names none.
        """
        from llmkit.evaluation.planning import Selection

        wanted = [s.strip() for s in (self.subjects or "").split(",") if s.strip()]
        if self.subjects is not None and not wanted:
            raise InputError("--subjects names none", hint="leave --subjects out for all of them")
        return Selection(
            bench,
            data=self.data,
            split=self.split,
            protocol=self.protocol,
            shots=self.shots,
            limit=int(self.limit) if self.limit is not None and self.limit.is_integer() else self.limit,
            subjects=wanted,
            max_length=self.max_length,
            chat_template=templates.name or templates.chat,
            submission=self.submission,
            include=self.include_path,
        )


@command(
    "llmkit eval vicuna-7b --bench mmlu --data mmlu/data -o vicuna-7b.mmlu.json",
    "llmkit eval vicuna-7b-int4 --bench mmlu,ceval --dtype bfloat16 --limit 100",
    "llmkit eval vicuna-7b --bench ceval --subjects STEM,law --shots 5",
    "llmkit eval vicuna-7b --bench mini --fail-under 0.45",
    "llmkit eval vicuna-7b-int4 --bench mmlu --compare vicuna-7b.mmlu.json --max-drop 0.01 --junit eval.xml",
    "llmkit eval vicuna-7b --bench mmlu --data mmlu/data --shard 2/3 -o mmlu.shard-2-of-3.json",
    "llmkit eval vicuna-7b --bench mmlu --backend openai --url http://localhost:8000/v1 -o served.json",
    name="eval",
)
def evaluate(
    out: Output,
    model: ModelArgument,
    bench: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]",
            autocompletion=completion.benches,
            help="mmlu, mmlu_pro, ceval, cmmlu, mini, or any task or group of lm-eval.",
        ),
    ],
    selecting: SelectionOptions,
    templates: ChatOptions,
    computing: ComputeOptions,
    gating: GateOptions,
    scaling: ScalingOptions,
    show: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Print the first N prompts of each subject with their token ids; score nothing."
        ),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="BASELINE", help="Compare with this record, question by question.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Keep every question with its log-probabilities in the record.")
    ] = False,
    output: JsonPath = None,
) -> None:
    """Score a model on benchmarks: lm-eval's tasks, prompts and metrics, each shared prompt prefix computed once.

    Prints accuracy by category and subject with standard errors, and the averages with their intervals. The record
    holds the same and all settings, versions and digests. Scores are computed in float32 whatever the dtype.
    """
    from llmkit.evaluation.engine import EngineOptions
    from llmkit.evaluation.record import check_record_path
    from llmkit.evaluation.records import read_record
    from llmkit.evaluation.runner import evaluate as run_evaluation
    from llmkit.pipeline.journal import is_journal

    selection = selecting.selection(bench, templates)
    if show is not None:
        out.refuse_options(
            {"output", "compare", "submission", *(f.name for f in fields(GateOptions))}, "--show, which scores nothing"
        )
        show_prompts(out, model, replace(selection, limit=show))
        return
    gates = gates_of(out, gating, has_baseline=compare is not None, how="--compare BASELINE.json")
    shard, output = _part(out, scaling.shard, output)
    if output is not None:
        check_record_path(output)
    _require_different({"--output": output, "--junit": gating.junit, "--submission": selection.submission})
    baseline = read_record(compare) if compare is not None else None
    gates.check_early(selection.names, baseline, compare)
    keep = _answers_path(output, repr((model, selection, computing, scaling)))
    engine = EngineOptions(
        **asdict(computing),
        url=scaling.url,
        batch_tokens=scaling.batch_tokens,
        memory=parse_bytes(scaling.memory) if scaling.memory is not None else None,
        progress=out.progress(),
    )
    with interruptible(lambda: _interrupted(keep)):
        record = run_evaluation(
            model, selection, engine=engine, log_samples=log_samples, keep=keep, shard=shard, tell=out.warning
        )
    if record.n_reused:
        out.note(f"went on from an interrupted run: {record.n_reused} of its answers were kept")
    if selection.submission is not None:
        out.note(
            f"wrote {selection.submission}" + ("" if record.benches else "; the split has no answers to score it with")
        )
    if output is not None:
        record.write(output)
    if is_journal(keep):
        with suppress(OSError):
            keep.unlink()
    for warning in [*record.warnings, *record.letter_warnings]:
        out.warning(warning)
    comparisons = compared(out, [baseline, record], [compare, output], gating) if baseline is not None else []
    checked = gates.check([record], comparisons)
    document = record.to_json() | outcome(comparisons, checked)

    def render() -> None:
        render_record(out, record, output)
        if comparisons:
            out.line()
        render_comparisons(out, comparisons)

    brief = [f"{name} {score:.4f}" for name, score in record.scores.items()] + [c.sentence for c in comparisons]
    out.answer(document, render, brief="\n".join(brief))
    gates.finish(out, [record], comparisons, checked)


def _require_different(written: Mapping[str, Path | None]) -> None:
    """Refuse two options that would write one file, before anything is scored."""
    seen: dict[str, str] = {}
    for option, path in written.items():
        if path is not None and (other := seen.setdefault(os.path.realpath(path), option)) != option:
            raise InputError(f"{other} and {option} name one file: {path}", hint=f"another file for {option}")


def _part(out: Output, text: str | None, output: Path | None) -> tuple[Shard | None, Path | None]:
    """Which part of the run this process does, and where its record goes."""
    from llmkit.evaluation.shards import read_shard, started_by

    if text is None:
        if (many := started_by(os.environ)) is not None:
            starter, n = many
            out.warning(f"{starter} started {n} processes, and each scores everything: --shard auto gives each a part")
        return None, output
    shard = read_shard(text, os.environ)
    out.refuse_options(
        {"compare", "fail_under", "max_drop", "strict", "common", "junit"},
        f"one part of a run (--shard {shard})",
        hint="llmkit report takes them, for all parts together",
    )
    if output is None:
        raise InputError(f"--shard {shard}: the record of a part is of use in a file", hint="add -o RUN.json")
    if text == "auto":
        output = shard.path_beside(output)
        out.note(f"this process does part {shard}: {output}")
    return shard, output


def _answers_path(output: Path | None, settings: str) -> Path:
    """Where answers are kept until all are there: beside the record, or in the user's cache."""
    from llmkit.evaluation.answers import SUFFIX

    if output is not None:
        return output.with_name(output.name + SUFFIX)
    import hashlib
    import tempfile

    cache = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llmkit"
    if cache.parts[0] == "~":  # a user without a home
        cache = Path(tempfile.gettempdir()) / "llmkit"
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{hashlib.sha256(f'{Path.cwd()} {settings}'.encode()).hexdigest()[:32]}{SUFFIX}"


def _interrupted(keep: Path) -> Interrupted:
    from llmkit.evaluation.answers import count_answers

    n = count_answers(keep)
    if not n:
        return Interrupted(is_resumable=False)
    return Interrupted(is_resumable=True, kept=f"{n} answers are kept in {keep}")
