"""The questions of logged samples as text: what benchmarks call them differs from one to the next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.evaluation.record import BenchResult, Question, RunRecord, SubjectResult

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FOUR = tuple(LETTERS[:4])
"""The letters of most benchmarks."""


def question_and_choices(document: object) -> tuple[str, list[str]]:
    """Question and choices of a document in the forms of the known benchmarks; others are given as JSON."""
    body: Mapping[str, Any] = document if isinstance(document, Mapping) else {}
    lowered = {str(k).lower(): v for k, v in body.items()}
    listed = lowered.get("choices", lowered.get("options"))
    if isinstance(listed, Mapping):  # ARC
        listed = listed.get("text")
    if not isinstance(listed, list):
        listed = [body[letter] for letter in LETTERS if letter in body]
    text = lowered.get("question", lowered.get("query"))
    if not isinstance(text, str):
        return json.dumps(document, ensure_ascii=False, indent=1, default=str), []
    return text, [str(choice) for choice in listed]


def logged_questions(
    record: RunRecord, bench: BenchResult
) -> Iterator[tuple[SubjectResult, Question, Mapping[str, Any] | None]]:
    """Every question of a benchmark, with what `--log-samples` kept of it."""
    for subject in bench.subjects:
        logged = record.samples.get(bench.bench.task_name(subject.name), ())
        for i, question in enumerate(subject.questions):
            sample = logged[i] if i < len(logged) else None
            yield subject, question, sample if isinstance(sample, Mapping) else None
