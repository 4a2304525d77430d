"""The answers to a split whose right ones are not published, in the form that a leaderboard takes.

C-Eval's `submission.json` is UTF-8 JSON `{subject: {"0": "A", "1": "C", …}}`: every subject, and in it every `id` of
the test split, from 0 on without a gap (hkust-nlp/ceval, README, "How to Submit").
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, listing
from llmkit.evaluation.benches import Bench
from llmkit.evaluation.csv_forms import has_answers
from llmkit.evaluation.documents import FOUR
from llmkit.evaluation.planning import Prepared, Selection
from llmkit.evaluation.record import BenchResult
from llmkit.pipeline.files import check_file, write_file

_KIND = "a submission"
Answers = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Submission:
    """A submission that a run is to leave.

    Attributes:
        bench: with the split that is submitted.
        ids: of its questions, by subject.
        is_scored: the right answers are there too.
    """

    bench: Bench
    ids: Mapping[str, Sequence[str]]
    is_scored: bool
    path: Path

    def write(self, result: BenchResult) -> int:
        """Write the file; an answer that could not be read is drawn, as published scripts do, with a fixed seed.

        Returns:
            How many were drawn.
        """
        draw = random.Random(0)
        answers: dict[str, dict[str, str]] = {}
        n_drawn = 0
        for subject in result.subjects:
            names = self.ids[subject.name]
            n_drawn += sum(not q.choice for q in subject.questions)
            answers[subject.name] = {names[int(q.id)]: q.choice or draw.choice(FOUR) for q in subject.questions}
        write_submission(self.bench, answers, self.ids, self.path)
        return n_drawn


def plan_submission(selection: Selection, prepared: Sequence[Prepared]) -> Submission | None:
    """What a run has to answer for a submission; None where none is wanted.

    Raises:
        InputError: several benchmarks, a limit, no local files, or see `check_submittable`.
        OutputError: no submission can be written there.
    """
    path = selection.submission
    if path is None:
        return None
    if len(selection.names) > 1 or not prepared:
        raise InputError(
            f"--submission is about one benchmark, found {', '.join(selection.names)}", hint="--bench ceval"
        )
    (item,) = prepared
    bench = item.work.bench
    if selection.limit is not None:
        raise InputError("--submission has an answer to every question", hint="leave --limit out")
    docs = {subject: of_splits[bench.split] for subject, of_splits in item.work.docs.items() if of_splits is not None}
    if not docs:
        raise InputError(f"--submission needs {bench.title}'s {bench.split} files", hint="give them: --data FOLDER")
    ids = {subject: [str(doc.get("id", "")) for doc in some] for subject, some in docs.items()}
    check_submittable(bench, ids, path)
    return Submission(bench, ids, all(map(has_answers, docs.values())), path)


def check_submittable(bench: Bench, ids: Mapping[str, Sequence[str]], path: Path) -> None:
    """Refuse, before anything is scored, what would be no complete submission.

    Args:
        ids: of the questions that will be answered, by subject.
        path: of the file to write.

    Raises:
        InputError: the benchmark or the split takes none, subjects are missing, ids are not 0, 1, 2, …
        OutputError: no submission can be written there.
    """
    if bench.split != bench.submitted:
        wanted = f"--split {bench.submitted}" if bench.submitted else "--bench ceval --split test"
        raise InputError(f"{bench.title} takes no submission of its {bench.split} split", hint=wanted)
    _check_subjects(bench, ids)
    for subject, names in ids.items():
        if missing := [str(i) for i in range(len(names)) if str(i) not in names]:
            raise InputError(
                f"{bench.title} {subject}: {len(names)} questions, but none with the id {missing[0]}; a submission has "
                f"the ids 0 to {len(names) - 1}",
                hint="take the published test files as they are",
            )
    check_file(path, _KIND, _is_submission)


def write_submission(bench: Bench, answers: Answers, ids: Mapping[str, Sequence[str]], path: Path) -> None:
    """Write the file, whole or not at all.

    Args:
        answers: subject -> id -> letter; empty where an answer could not be read.
        ids: of the split's questions, by subject.

    Raises:
        InputError: it is not complete (see `check_submission`).
        OutputError: no submission can be written there.
    """
    check_submission(bench, answers, ids)
    ordered = {s: {i: answers[s][i] for i in sorted(answers[s], key=int)} for s in bench.by_name}
    text = json.dumps(ordered, ensure_ascii=False, indent=1) + "\n"
    write_file(path, text.encode(), _KIND, _is_submission)


def check_submission(bench: Bench, answers: Any, ids: Mapping[str, Sequence[str]]) -> None:
    """Refuse a submission that is not complete.

    Raises:
        InputError: names the subject, and how many of its questions are answered.
    """
    if not isinstance(answers, Mapping) or not all(isinstance(v, Mapping) for v in answers.values()):
        raise InputError('a submission is an object of objects: {"law": {"0": "A"}}')
    _check_subjects(bench, answers)
    for subject, names in ids.items():
        given = answers[subject]
        right = [i for i in names if given.get(i) in FOUR]
        if len(right) < len(names):
            first = next(i for i in names if given.get(i) not in FOUR)
            found = repr(given[first]) if first in given else "nothing"
            raise InputError(
                f"{bench.title} {subject}: {len(right)} of {len(names)} questions have an answer from A to D; "
                f"question {first} has {found}"
            )
        if more := [i for i in given if i not in names]:
            raise InputError(f"{bench.title} {subject}: no question has the id {more[0]}; there are {len(names)}")


def _check_subjects(bench: Bench, subjects: Mapping[str, Any]) -> None:
    missing = [s for s in bench.by_name if s not in subjects]
    if missing:
        raise InputError(
            f"a submission has all {len(bench.by_name)} subjects of {bench.title}; {len(missing)} are missing: "
            f"{listing(missing)}",
            hint="leave --subjects out, and give the whole test split",
        )
    if unknown := [s for s in subjects if s not in bench.by_name]:
        raise InputError(f"{bench.title} has no subject {unknown[0]}")


def _is_submission(head: bytes) -> bool:
    start = b'{"advanced_mathematics":{"0":"'
    squeezed = b"".join(head[:256].split())
    return squeezed.startswith(start) or start.startswith(squeezed)
