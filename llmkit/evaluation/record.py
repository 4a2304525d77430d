"""What an evaluation run leaves: one JSON document that says what was scored, how, and with what result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from llmkit.evaluation.benches import Bench, Subject
from llmkit.evaluation.letters import Letters, letters_of
from llmkit.evaluation.statistics import Mean, macro, macro_of_groups, micro
from llmkit.pipeline.files import check_file, write_file

FORMAT = "llmkit.eval/2"
_KIND = "a record of llmkit eval"


@dataclass(frozen=True, slots=True)
class Question:
    """One question's answer.

    Attributes:
        id: of the question, unique in its subject: its row in the file, unless the data name it.
        choice: the chosen letter; empty when an answer could not be read.
        target: the right letter.
        logprobs: natural log-probabilities of the choices, in their order; None where none were computed.
        mass: the probability of all letters together, 0 to 1; None where they are not single tokens of one place.
        prompt: the first 16 hexadecimal digits of the SHA-256 of the token ids that were sent; empty where unknown.
    """

    id: str
    choice: str
    target: str
    logprobs: tuple[float, ...] | None = None
    mass: float | None = None
    prompt: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the chosen letter is the right one."""
        return bool(self.choice) and self.choice == self.target


# The columns of a record's subjects: name in JSON -> attribute of `Question`.
COLUMNS = {
    "ids": "id",
    "choices": "choice",
    "targets": "target",
    "logprobs": "logprobs",
    "mass": "mass",
    "prompts": "prompt",
}


@dataclass(frozen=True)
class SubjectResult:
    """One subject's scores.

    Attributes:
        subject: name, label and categories.
        acc: share of questions whose best-scored choice is right.
        questions: in order of the file; empty in a record that has the averages alone.
        metrics: lm-eval's other per-question metrics (C-Eval's acc_norm).
    """

    subject: Subject
    acc: Mean
    questions: tuple[Question, ...] = ()
    metrics: Mapping[str, Mean] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the subject."""
        return self.subject.name

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "label": self.subject.label,
            "category": self.subject.category,
            "subcategory": self.subject.subcategory,
            "n": self.acc.n,
            "acc": self.acc.value,
            "stderr": self.acc.stderr,
            "interval": self.acc.interval,
            "metrics": {k: v.to_json() for k, v in self.metrics.items()},
            **{column: [getattr(q, name) for q in self.questions] for column, name in COLUMNS.items()},
        }


@dataclass(frozen=True)
class BenchResult:
    """A benchmark's scores; averages are defined in `llmkit.evaluation.statistics`.

    Attributes:
        subjects: in the benchmark's order.
        missing: subjects of the benchmark that were not scored.
        shots: shots in each prompt.
        n_truncated: prompts that lost tokens on the left because they were longer than the model's context.
        task_version, task_digest: lm-eval's version of the tasks, and a digest of their definitions; of a protocol
            with prompts of its own of its name and settings.
        protocol: how questions were put and answers read.
        average: the one that the protocol's authors report: micro, over questions, or macro, over subjects.
        n_fewer_shots: prompts that have fewer shots, so that they fit, by the rule of their protocol.
        letter_ids: letter -> the token sequences that counted as it, after the first prompt.
    """

    bench: Bench
    subjects: tuple[SubjectResult, ...]
    missing: tuple[str, ...]
    shots: int
    n_truncated: int
    task_version: str
    task_digest: str
    elapsed_s: float
    tokens: Mapping[str, int]
    protocol: str = "lm-eval"
    average: str = "micro"
    letter_ids: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    n_fewer_shots: int = 0

    @property
    def title(self) -> str:
        """Of the benchmark, with the protocol where it is not lm-eval's own (`C-Eval official`)."""
        return self.bench.title if self.protocol == "lm-eval" else f"{self.bench.title} {self.protocol}"

    @property
    def reported(self) -> Mean:
        """The average that the protocol's authors report."""
        return self.macro if self.average == "macro" else self.micro

    @property
    def micro(self) -> Mean:
        """Every question counts the same."""
        return micro(s.acc for s in self.subjects)

    @property
    def macro(self) -> Mean:
        """Every subject counts the same."""
        return macro(s.acc for s in self.subjects)

    @property
    def macro_categories(self) -> Mean | None:
        """Every category counts the same; None without categories."""
        groups = {k: self._accs(v) for k, v in self.bench.categories(self._names).items()}
        return macro_of_groups(groups) if groups else None

    @property
    def categories(self) -> dict[str, tuple[Mean, Mean]]:
        """Micro and macro of each category."""
        return self._averages(self.bench.categories(self._names))

    @property
    def subcategories(self) -> dict[str, tuple[Mean, Mean]]:
        """Micro and macro of each subcategory."""
        return self._averages(self.bench.subcategories(self._names))

    @property
    def subsets(self) -> dict[str, tuple[Mean, Mean]]:
        """Micro and macro of each subset of which a subject was scored (C-Eval's hard subjects)."""
        present = {k: [s for s in self._names if s in v] for k, v in self.bench.subsets.items()}
        return self._averages({k: v for k, v in present.items() if v})

    @property
    def letters(self) -> Letters | None:
        """Chance level, the commonest letter and the probability of all; None of averages alone."""
        return letters_of([q for s in self.subjects for q in s.questions])

    @property
    def _names(self) -> list[str]:
        return [s.name for s in self.subjects]

    def _accs(self, names: Iterable[str]) -> list[Mean]:
        wanted = list(names)
        return [s.acc for s in self.subjects if s.name in wanted]

    def _averages(self, groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[Mean, Mean]]:
        return {k: (micro(self._accs(v)), macro(self._accs(v))) for k, v in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""

        def pairs(groups: Mapping[str, tuple[Mean, Mean]]) -> dict[str, Any]:
            return {k: {"micro": a.to_json(), "macro": b.to_json()} for k, (a, b) in groups.items()}

        overall, letters = self.macro_categories, self.letters
        return {
            "title": self.bench.title,
            "protocol": self.protocol,
            "average": self.average,
            "micro": self.micro.to_json(),
            "macro": self.macro.to_json(),
            "macro_categories": overall.to_json() if overall else None,
            "letters": letters.to_json() if letters else None,
            "categories": pairs(self.categories),
            "subcategories": pairs(self.subcategories),
            "subsets": pairs(self.subsets),
            "subjects": {s.name: s.to_json() for s in self.subjects},
            "missing": list(self.missing),
            "shots": self.shots,
            "n_truncated": self.n_truncated,
            "n_fewer_shots": self.n_fewer_shots,
            "task_version": self.task_version,
            "task_digest": self.task_digest,
            "elapsed_s": round(self.elapsed_s, 3),
            "tokens": dict(self.tokens),
            "letter_ids": {k: [list(ids) for ids in v] for k, v in self.letter_ids.items()},
        }


@dataclass(frozen=True)
class RunRecord:
    """One evaluation run.

    Attributes:
        model: label, path, digests, dtype, device.
        settings: what was asked for.
        versions: of llmkit, lm-eval, transformers, torch and Python.
        benches: results by benchmark.
        tasks: lm-eval's own results for its other tasks: task -> metric -> value.
        continuations: token ids that were scored for each of the first distinct continuations (` A` -> [330]).
        samples: per question, by task name; empty unless they were asked for.
        warnings: what the user should know before quoting the figures.
        n_reused: answers that an interrupted run had left.
        shard: of one of several parts of a run: index, count and what the whole consists of
            (`llmkit.evaluation.sharding`); empty for a whole run.
    """

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    elapsed_s: float
    benches: Mapping[str, BenchResult]
    tasks: Mapping[str, Any]
    continuations: Mapping[str, Sequence[int]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    n_reused: int = 0
    shard: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """The one figure of each benchmark or task that `--fail-under` looks at: the average its authors report."""
        by_bench = {name: result.reported.value for name, result in self.benches.items()}
        by_task = {name: _first_share(metrics) for name, metrics in self.tasks.items()}
        return by_bench | {name: value for name, value in by_task.items() if value is not None}

    @property
    def letter_warnings(self) -> list[str]:
        """Reasons not to quote the figures."""
        benches = self.benches.values()
        return [warning for b in benches if b.letters is not None for warning in b.letters.warnings(b.bench.title)]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        body = {
            "format": FORMAT,
            "created": self.created,
            "model": dict(self.model),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "scores": self.scores,
            "benches": {k: v.to_json() for k, v in self.benches.items()},
            "tasks": dict(self.tasks),
            "continuations": {k: list(v) for k, v in self.continuations.items()},
            "elapsed_s": round(self.elapsed_s, 3),
            "warnings": list(self.warnings),
        }
        if self.n_reused:
            body["n_reused"] = self.n_reused
        if self.shard:
            body["shard"] = dict(self.shard)
        if self.samples:
            body["samples"] = {k: list(v) for k, v in self.samples.items()}
        return body

    def write(self, path: str | Path) -> None:
        """Write the record; the file is whole or not there.

        Raises:
            OutputError: another file lies there, or the folder is missing or cannot be written.
        """
        write_file(Path(path), self.to_bytes(), _KIND, _is_record)

    def to_bytes(self) -> bytes:
        """As the text of a file."""
        text = json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n"
        return text.encode("utf-8", "backslashreplace")


def _first_share(metrics: Mapping[str, Any]) -> float | None:
    """Of a task's metrics the accuracy, the exact match, or another share of right answers; its first filter's."""
    values: dict[str, float] = {}
    for (name, _), share in shares_of(metrics).items():
        values.setdefault(name, share.value)
    return next((values[name] for name in ("acc", "exact_match", "acc_norm", *values) if name in values), None)


def shares_of(metrics: Mapping[str, Any]) -> dict[tuple[str, str], Mean]:
    """Those of an lm-eval task's metrics that are shares of right answers, by (metric, filter).

    `n` is 0 where it is not known: of groups, and where lm-eval gives no standard error (IFEval's instructions are more
    than its questions).
    """
    shares = {}
    for key, value in metrics.items():
        name, _, rest = key.partition(",")
        is_share = name in ("acc", "exact_match") or name.startswith("acc_") or name.endswith("_acc")
        if not is_share or "_stderr" in name or not isinstance(value, float) or not 0 <= value <= 1:
            continue
        stderr, n = metrics.get(f"{name}_stderr,{rest}"), metrics.get("sample_len")
        if not isinstance(stderr, float) or not isfinite(stderr):
            shares[name, rest] = Mean(value, None, 0)
        else:
            shares[name, rest] = Mean(value, stderr, n if isinstance(n, int) and n > 0 else 0)
    return shares


def check_record_path(path: Path) -> None:
    """Refuse, before anything is scored, a path where no record can be written.

    Raises:
        OutputError: another file lies there, or its folder is missing.
    """
    check_file(path, _KIND, _is_record)


def _is_record(head: bytes) -> bool:
    start = f'{{"format":"{FORMAT.partition("/")[0]}/'.encode()
    squeezed = b"".join(head[:256].split())
    return squeezed.startswith(start) or start.startswith(squeezed)
