"""The questions that two runs have in common, by benchmark or task, subject and id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.errors import InputError, counted, listing
from llmkit.evaluation.record import Question, RunRecord

_METRICS = ("acc", "exact_match", "acc_norm")  # in the order of `RunRecord.scores`

Questions = Mapping[str, Sequence[Question]]
"""By subject; a task without subjects is its own."""


@dataclass(frozen=True)
class MatchedQuestions:
    """The questions that both of two runs answered.

    Attributes:
        pairs: by subject: each question as the one and as the other run answered it.
        n_left_out: questions of either run that the other does not have, or has with another right answer.
        n_other_prompts: pairs whose prompts had other token ids.
    """

    pairs: Mapping[str, Sequence[tuple[Question, Question]]]
    n_left_out: int
    n_other_prompts: int


def questions_of(record: RunRecord, name: str) -> Questions:
    """The questions of a benchmark or of one of lm-eval's other tasks; empty where the record has averages alone."""
    if name in record.benches:
        return {s.name: s.questions for s in record.benches[name].subjects if s.questions}
    samples = [q for s in record.samples.get(name, ()) if (q := _of_sample(s)) is not None]
    return {name: samples} if samples else {}


def _of_sample(sample: Mapping[str, Any]) -> Question | None:
    """A sample of a task as a question; None where its metric is no 0 or 1.

    What is right is what the metric says: a choice that it counts is written as the target.
    """
    score = next((float(sample[m]) for m in _METRICS if isinstance(sample.get(m), int | float)), None)
    if score not in (0.0, 1.0):
        return None
    responses = sample.get("responses") or []
    logprobs = None
    if responses and all(isinstance(r, list) and len(r) == 2 for r in responses):
        logprobs = tuple(float(r[0]) for r in responses)
    choice = str(logprobs.index(max(logprobs)) if logprobs else responses[0] if responses else "")
    target = choice if score else f"not {choice}"
    return Question(str(sample.get("doc_id")), choice, target, logprobs)


def match(a: RunRecord, b: RunRecord, name: str, labels: tuple[str, str], *, common: bool = False) -> MatchedQuestions:
    """The questions of benchmark or task `name` that both runs answered.

    Args:
        labels: what the runs are called in errors.
        common: compare those that both have, where one has others, or was made with other shots or another protocol.

    Raises:
        InputError: the runs have no question in common, or, without `common`, not the same ones in the same way.
    """
    if not common:
        _check_settings(a, b, name, labels)
    mine, theirs = (questions_of(record, name) for record in (a, b))
    for questions, label in zip((mine, theirs), labels, strict=True):
        if not questions:
            raise InputError(
                f"{label} has no answers to the questions of {name}, which a comparison needs",
                hint="make the record anew: llmkit eval -o RUN.json (for lm-eval's tasks with --log-samples)",
            )
    is_task = name not in a.benches
    keyed = [{(s, q.id): q for s, qs in run.items() for q in qs} for run in (mine, theirs)]
    both = [key for key in keyed[0] if key in keyed[1]]
    same = [key for key in both if is_task or keyed[0][key].target == keyed[1][key].target]
    if not common:
        _check_keys(keyed, both, same, name, labels)
    if not same:
        raise InputError(f"{labels[0]} and {labels[1]} have no question of {name} in common")
    pairs: dict[str, list[tuple[Question, Question]]] = {}
    for key in same:
        pairs.setdefault(key[0], []).append((keyed[0][key], keyed[1][key]))
    return MatchedQuestions(
        pairs=pairs,
        n_left_out=sum(map(len, keyed)) - 2 * len(same),
        n_other_prompts=sum(_is_other_prompt(p, q) for some in pairs.values() for p, q in some),
    )


def _is_other_prompt(a: Question, b: Question) -> bool:
    return bool(a.prompt and b.prompt) and a.prompt != b.prompt


def _check_settings(a: RunRecord, b: RunRecord, name: str, labels: tuple[str, str]) -> None:
    said = [_settings(record, name) for record in (a, b)]
    for key, value in said[0].items():
        other = said[1].get(key)
        if value is not None and other is not None and value != other:
            raise InputError(
                f"{name} was scored in two ways: {key} {value} in {labels[0]}, {other} in {labels[1]}",
                hint="score both in one way, or compare them all the same: --common",
            )


def _settings(record: RunRecord, name: str) -> dict[str, Any]:
    if name not in record.benches:
        return {"shots": record.tasks.get(name, {}).get("shots")}
    result = record.benches[name]
    return {"protocol": result.protocol, "shots": result.shots}


def _check_keys(
    keyed: Sequence[Mapping[tuple[str, str], Question]],
    both: Sequence[tuple[str, str]],
    same: Sequence[tuple[str, str]],
    name: str,
    labels: tuple[str, str],
) -> None:
    only = [Counter(key[0] for key in keyed[i] if key not in keyed[1 - i]) for i in (0, 1)]
    if only[0] or only[1]:
        parts = [
            f"{n.total()} only in {label} ({listing((f'{s} {k}' for s, k in n.items()), 3)})"
            for n, label in zip(only, labels, strict=True)
            if n
        ]
        raise InputError(
            f"the runs did not answer the same questions of {name}: {len(both)} in both, {', '.join(parts)}",
            hint="compare those that both have: --common",
        )
    if len(same) < len(both):
        raise InputError(
            f"{counted(len(both) - len(same), 'question')} of {name} (of {len(both)}) have another right answer in "
            f"{labels[1]} than in {labels[0]}: the data differ",
            hint="compare the others: --common",
        )
