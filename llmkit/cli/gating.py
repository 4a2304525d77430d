"""Thresholds on scores and on drops from a baseline: what `eval` and `report` do with their options `GateOptions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.cli.options import GateOptions
from llmkit.cli.output import Output
from llmkit.errors import InputError

if TYPE_CHECKING:
    from llmkit.evaluation.comparison import Comparison
    from llmkit.evaluation.gates import Gate, Threshold
    from llmkit.evaluation.record import RunRecord

_UNDER, _DROP = "--fail-under", "--max-drop"


@dataclass(frozen=True)
class Gates:
    """The options, checked before anything is scored."""

    options: GateOptions
    least: Sequence[Threshold]
    drops: Sequence[Threshold]

    def check_early(self, names: Sequence[str], baseline: RunRecord | None, path: object) -> None:
        """Refuse, before anything is scored, what names a benchmark that will not be.

        Args:
            names: the benchmarks and tasks to be scored.
            baseline: what they will be compared with, which lies at `path`.

        Raises:
            InputError: a threshold is on another benchmark, or the baseline lacks one.
        """
        from llmkit.evaluation.benches import bench_names
        from llmkit.evaluation.gates import check_names

        if all(name in bench_names() for name in names):  # a group of lm-eval's has other names in its results
            check_names(self.least, names, _UNDER)
            check_names(self.drops, names, _DROP)
            lacking = [name for name in names if baseline is not None and name not in baseline.benches]
            if lacking and not self.options.common:
                raise InputError(
                    f"{path} has no {', '.join(lacking)}, which is to be compared with it",
                    hint="name a record of the same benchmarks, or compare what both have: --common",
                )

    def check(self, records: Sequence[RunRecord], comparisons: Sequence[Comparison]) -> list[Gate]:
        """Hold every threshold against the runs that are not the baseline, and against the comparisons.

        Raises:
            InputError: a threshold names what is not there.
        """
        from llmkit.evaluation.gates import check_drops, check_scores

        gates = [gate for record in records for gate in check_scores(record, self.least, _UNDER)]
        return gates + check_drops(comparisons, self.drops, _DROP, strict=self.options.strict)

    def finish(
        self, out: Output, records: Sequence[RunRecord], comparisons: Sequence[Comparison], gates: Sequence[Gate]
    ) -> None:
        """Write the JUnit file, and leave with exit code 1 where a threshold is not kept."""
        if self.options.junit is not None:
            from llmkit.evaluation.junit import comparison_cases, junit_xml, score_cases, write_junit

            cases = {k: v for record in records for k, v in score_cases(record).items()}
            for bench, some in comparison_cases(comparisons).items():
                cases[bench] = [*cases.get(bench, ()), *some]
            elapsed = {name: r.elapsed_s for record in records for name, r in record.benches.items()}
            write_junit(self.options.junit, junit_xml(cases, gates, elapsed))
        if self.least and not any(record.scores for record in records):
            out.refuse(f"{_UNDER}: these tasks have no accuracy to compare")
        low = [gate.message for gate in gates if not gate.passed]
        if low:
            out.refuse("; ".join(low))


def gates_of(out: Output, options: GateOptions, *, has_baseline: bool, how: str) -> Gates:
    """The thresholds of the command line, before anything is scored.

    Args:
        has_baseline: whether runs are compared.
        how: what would make it so, for errors.

    Raises:
        LlmkitError: a threshold that is none, an option without the one that it is for, or a JUnit file that cannot be
            written.
    """
    from llmkit.evaluation.gates import parse_thresholds

    if not has_baseline:
        out.refuse_options(["max_drop", "common"], "a run without a baseline", how)
    if options.strict and options.max_drop is None:
        raise InputError("--strict is about --max-drop, which is not there", hint="--max-drop 0.01 --strict")
    if options.junit is not None:
        from llmkit.evaluation.junit import check_junit_path

        check_junit_path(options.junit)
    return Gates(
        options,
        parse_thresholds(options.fail_under, _UNDER) if options.fail_under is not None else (),
        parse_thresholds(options.max_drop, _DROP) if options.max_drop is not None else (),
    )
