"""Questions whose answer changed between two runs, to read: text, choices, what each run chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from llmkit.evaluation.documents import LETTERS, logged_questions, question_and_choices
from llmkit.evaluation.record import BenchResult, Question, RunRecord
from llmkit.report.setting import number, percent

_SHOWN = 40  # of one comparison; a page stays one that a phone opens


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer that was offered, and who chose it."""

    letter: str
    text: str
    is_right: bool
    tags: Sequence[str]


@dataclass(frozen=True, slots=True)
class ChangedQuestion:
    """A question whose answer changed.

    Attributes:
        kind: "bad" for an answer that became wrong, "good" for one that became right, "" for another wrong one.
        prompt: as it was sent, where the record has it.
    """

    title: str
    kind: str
    change: str
    text: str
    choices: Sequence[Choice]
    prompt: str


@dataclass(frozen=True, slots=True)
class Flips:
    """The changed questions of two runs over one benchmark."""

    title: str
    words: str
    questions: Sequence[ChangedQuestion]


def flips(bench: str, runs: tuple[RunRecord, RunRecord], names: tuple[str, str]) -> Flips | None:
    """The questions that both runs answered otherwise; None where none are, or no run kept their texts."""
    results = runs[0].benches[bench], runs[1].benches[bench]
    documents = _documents(bench, runs)
    if not documents:
        return None
    changed = [(s, a, b) for s, a, b in _pairs(*results) if a.choice != b.choice]
    if not changed:
        return None
    order = {"bad": 0, "good": 1, "": 2}
    changed.sort(key=lambda item: order[_kind(item[1], item[2])])
    readable = [(s, a, b, documents[s, a.id]) for s, a, b in changed if (s, a.id) in documents]
    shown = [_question(*item, names) for item in readable[:_SHOWN]]
    words = f"{number(len(changed))} answers differ"
    if len(shown) < len(changed):
        words += f"; here are {len(shown)}, those that became wrong first"
    return Flips(f"{results[0].bench.title}: {names[0]} → {names[1]}", f"{words}.", shown)


def _pairs(before: BenchResult, after: BenchResult) -> Iterator[tuple[str, Question, Question]]:
    others = {(s.name, q.id): q for s in after.subjects for q in s.questions}
    for subject in before.subjects:
        for question in subject.questions:
            if (subject.name, question.id) in others:
                yield subject.name, question, others[subject.name, question.id]


def _documents(bench: str, runs: Sequence[RunRecord]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """What `--log-samples` kept, by subject and question."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for run in reversed(runs):
        for subject, question, logged in logged_questions(run, run.benches[bench]):
            if logged is not None:
                found[subject.name, question.id] = logged
    return found


def _kind(before: Question, after: Question) -> str:
    return "bad" if before.is_right else "good" if after.is_right else ""


def _question(
    subject: str, before: Question, after: Question, sample: Mapping[str, Any], names: tuple[str, str]
) -> ChangedQuestion:
    text, choices = question_and_choices(sample.get("doc"))
    letters = list(LETTERS[: len(choices)]) or sorted({before.choice, after.choice, before.target} - {""})
    views = []
    for i, letter in enumerate(letters):
        tags = ["right answer"] if letter == before.target else []
        tags += [f"{n}{_share(q, i)}" for n, q in zip(names, (before, after), strict=True) if q.choice == letter]
        views.append(Choice(letter, choices[i] if choices else "", letter == before.target, tags))
    unread = [n for n, q in zip(names, (before, after), strict=True) if not q.choice]
    if unread:
        views.append(Choice("–", "no answer that could be read", False, unread))
    change = {"bad": "right → wrong", "good": "wrong → right", "": "wrong → wrong"}[_kind(before, after)]
    prompt = sample.get("prompt")
    title = f"{subject.replace('_', ' ')}, question {before.id}"
    return ChangedQuestion(title, _kind(before, after), change, text, views, prompt if isinstance(prompt, str) else "")


def _share(question: Question, i: int) -> str:
    """The share of a choice among the choices' probabilities."""
    if question.logprobs is None or i >= len(question.logprobs):
        return ""
    top = max(question.logprobs)
    return f" {percent(exp(question.logprobs[i] - top) / sum(exp(x - top) for x in question.logprobs), 0)} %"
