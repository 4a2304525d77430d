"""Runs compared with a baseline, question by question: what is known of the difference, and which answers flipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.errors import InputError, counted
from llmkit.evaluation.matching import MatchedQuestions, match
from llmkit.evaluation.paired import ALPHA, bootstrap_interval, difference_interval, holm, mcnemar, mean_kl
from llmkit.evaluation.record import Question, RunRecord
from llmkit.evaluation.statistics import Interval, Mean, macro, macro_of_groups, mean, micro

Pair = tuple[Question, Question]


@dataclass(frozen=True, slots=True)
class Difference:
    """The change of one average from the baseline to the other run, over the same questions.

    Attributes:
        before, after: the average in both runs.
        change: after - before with its standard errors.
    """

    before: float
    after: float
    change: Mean

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the change."""
        return difference_interval(self.change)

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        low, high = self.interval
        return not low <= 0 <= high

    @property
    def is_clear_here(self) -> bool:
        """The same for questions of the given subjects alone: without clusters."""
        low, high = difference_interval(replace(self.change, n_clusters=1))
        return not low <= 0 <= high

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "before": self.before, "after": self.after, "change": self.change.value, "stderr": self.change.stderr,
            "stderr_clustered": self.change.stderr_clustered, "n": self.change.n, "interval": self.interval,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Flips:
    """Answers that are others than the baseline's."""

    to_wrong: int
    to_right: int
    wrong_to_wrong: int

    def to_json(self) -> dict[str, int]:
        """As a JSON object."""
        return {"to_wrong": self.to_wrong, "to_right": self.to_right, "wrong_to_wrong": self.wrong_to_wrong}


@dataclass(frozen=True)
class Comparison:
    """One run beside the baseline, on one benchmark or task.

    Attributes:
        bench, title: the benchmark's or task's name, and what it is called.
        baseline, label: what the two runs are called.
        average: the one that the protocol's authors report, micro or macro.
        averages: the changes by the name of the average: micro, macro, and categories where there are some.
        categories, subjects: the change (micro) and the flips of each.
        p_value: of McNemar's exact test over all questions.
        p_adjusted: the same, adjusted for the number of comparisons (Holm).
        bootstrap: the 95 % interval of the micro change by resampling subjects, then questions.
        kl: mean Kullback-Leibler divergence of the choices from the baseline's, in nats; None where none are known.
    """

    bench: str
    title: str
    baseline: str
    label: str
    average: str
    averages: Mapping[str, Difference]
    flips: Flips
    categories: Mapping[str, tuple[Difference, Flips]]
    subjects: Mapping[str, tuple[Difference, Flips]]
    p_value: float
    p_adjusted: float
    bootstrap: Interval
    kl: float | None
    n_left_out: int
    n_other_prompts: int

    @property
    def micro(self) -> Difference:
        """The change over all questions."""
        return self.averages["micro"]

    @property
    def reported(self) -> Difference:
        """The change of the average that the protocol's authors report."""
        return self.averages[self.average]

    def is_significant(self, average: str = "") -> bool:
        """Whether a change, of the reported average or of another, is more than chance on the subjects scored.

        Over all questions McNemar's exact test, adjusted for the number of comparisons, tells at 5 %; for the other
        averages the interval without clusters. (The clustered interval tells whether other subjects would show it.)
        """
        name = average or self.average
        return self.p_adjusted < ALPHA if name == "micro" else self.averages[name].is_clear_here

    @property
    def is_tied(self) -> bool:
        """Whether the runs differ neither by the interval nor by the test of significance."""
        return not self.reported.is_clear and not self.is_significant()

    @property
    def sentence(self) -> str:
        """The comparison in one sentence."""
        change, flips = self.reported, self.flips
        if not (flips.to_wrong or flips.to_right or flips.wrong_to_wrong):
            return f"{self.label} answers all {change.change.n} questions of {self.title} as {self.baseline} does"
        low, high = (f"{100 * x:+.1f}" for x in change.interval)
        interval = f"95 % interval {low} to {high}"
        flipped = f"{counted(flips.to_wrong, 'question')} flipped to wrong, {flips.to_right} to right"
        points = 100 * change.change.value
        if self.is_tied:
            tied = f"{self.label} is tied with {self.baseline} on {self.title}"
            return f"{tied} ({points:+.1f} points, {interval}); {flipped}"
        word = "worse" if points < 0 else "better"
        verdict = f"{self.label} is {word} than {self.baseline} by {abs(points):.1f} points on {self.title}"
        test = f"McNemar's p {self.p_adjusted:.2g}" if self.average == "micro" else "without clusters"
        if not change.is_clear:
            verdict += f" ({test}), in some subjects only; for others"
        elif not self.is_significant():
            verdict += f" (not significant: {test})"
        return f"{verdict}, {interval}; {flipped}"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""

        def groups(parts: Mapping[str, tuple[Difference, Flips]]) -> dict[str, Any]:
            return {name: difference.to_json() | flips.to_json() for name, (difference, flips) in parts.items()}

        return {
            "bench": self.bench,
            "baseline": self.baseline,
            "run": self.label,
            "sentence": self.sentence,
            "average": self.average,
            "averages": {name: difference.to_json() for name, difference in self.averages.items()},
            "flips": self.flips.to_json(),
            "p_value": self.p_value,
            "p_adjusted": self.p_adjusted,
            "significant": self.is_significant(),
            "tied": self.is_tied,
            "bootstrap": self.bootstrap,
            "kl": self.kl,
            "categories": groups(self.categories),
            "subjects": groups(self.subjects),
            "n_left_out": self.n_left_out,
            "n_other_prompts": self.n_other_prompts,
        }


def compare(
    baseline: RunRecord, others: Sequence[RunRecord], labels: Sequence[str], *, common: bool = False
) -> list[Comparison]:
    """Each of the other runs with the baseline, benchmark by benchmark.

    Args:
        labels: what the runs are called, the baseline first.
        common: see `matching.match`; benchmarks that one of two runs lacks are left out, too.

    Raises:
        InputError: the runs did not answer the same questions in the same way (without `common`), or none in common.
    """
    comparisons = []
    for other, label in zip(others, labels[1:], strict=True):
        for name in _names(baseline, other, (labels[0], label), common=common):
            matched = match(baseline, other, name, (labels[0], label), common=common)
            comparisons.append(_compared(baseline, name, matched, (labels[0], label)))
    adjusted = holm([c.p_value for c in comparisons])
    return [replace(c, p_adjusted=p) for c, p in zip(comparisons, adjusted, strict=True)]


def _names(a: RunRecord, b: RunRecord, labels: tuple[str, str], *, common: bool) -> list[str]:
    mine, theirs = ([*record.benches, *(t for t in record.samples if t in record.tasks)] for record in (a, b))
    shared = [name for name in mine if name in theirs]
    if not shared:
        raise InputError(
            f"{labels[0]} and {labels[1]} have no benchmark in common: {', '.join(mine) or 'none'} and "
            f"{', '.join(theirs) or 'none'}"
        )
    for label, names, rest in ((labels[0], mine, theirs), (labels[1], theirs, mine)):
        only = [name for name in names if name not in rest]
        if only and not common:
            raise InputError(
                f"only {label} has {', '.join(only)}; both have {', '.join(shared)}",
                hint="compare what both have: --common",
            )
    return shared


def _compared(baseline: RunRecord, name: str, matched: MatchedQuestions, labels: tuple[str, str]) -> Comparison:
    pairs = matched.pairs
    every = [pair for some in pairs.values() for pair in some]
    categories: dict[str, list[str]] = {}
    title = name
    if name in baseline.benches:
        bench = baseline.benches[name].bench
        categories, title = bench.categories(pairs), baseline.benches[name].title
    averages = {"micro": _difference(pairs, micro), "macro": _difference(pairs, macro)}
    if categories:
        averages["categories"] = _difference(
            pairs, lambda means: macro_of_groups(_grouped(list(pairs), list(means), categories))
        )
    flips = _flips(every)
    p_value = mcnemar(flips.to_wrong, flips.to_right)
    known = [(p.logprobs, q.logprobs) for p, q in every if p.logprobs and q.logprobs]
    known = [(p, q) for p, q in known if len(p) == len(q)]
    return Comparison(
        bench=name,
        title=title,
        baseline=labels[0],
        label=labels[1],
        average=baseline.benches[name].average if name in baseline.benches else "micro",
        averages=averages,
        flips=flips,
        categories={
            category: _part({subject: pairs[subject] for subject in members})
            for category, members in categories.items()
        },
        subjects={subject: _part({subject: some}) for subject, some in pairs.items()},
        p_value=p_value,
        p_adjusted=p_value,
        bootstrap=bootstrap_interval([[_change(pair) for pair in some] for some in pairs.values()]),
        kl=mean_kl([p for p, _ in known], [q for _, q in known]) if known else None,
        n_left_out=matched.n_left_out,
        n_other_prompts=matched.n_other_prompts,
    )


def _change(pair: Pair) -> int:
    return pair[1].is_right - pair[0].is_right


def _difference(pairs: Mapping[str, Sequence[Pair]], average: Callable[[Iterable[Mean]], Mean]) -> Difference:
    """The change of an average of subjects, which come in the order of `pairs`."""
    before = average(mean([float(p.is_right) for p, _ in some]) for some in pairs.values())
    after = average(mean([float(q.is_right) for _, q in some]) for some in pairs.values())
    return Difference(before.value, after.value, average(mean([*map(_change, some)]) for some in pairs.values()))


def _grouped(
    subjects: Sequence[str], means: Sequence[Mean], categories: Mapping[str, Sequence[str]]
) -> dict[str, list[Mean]]:
    by_name = dict(zip(subjects, means, strict=True))
    return {category: [by_name[s] for s in members] for category, members in categories.items()}


def _part(pairs: Mapping[str, Sequence[Pair]]) -> tuple[Difference, Flips]:
    return _difference(pairs, micro), _flips([pair for some in pairs.values() for pair in some])


def _flips(pairs: Sequence[Pair]) -> Flips:
    changes = [_change(pair) for pair in pairs]
    wrong = sum(not p.is_right and not q.is_right and p.choice != q.choice for p, q in pairs)
    return Flips(changes.count(-1), changes.count(1), wrong)
