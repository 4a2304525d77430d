"""The tasks and subjects of one shard of a run, and the description of the whole run in its record.

Imported only when something is evaluated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from lm_eval.api.registry import AGGREGATION_REGISTRY

from llmkit.errors import InputError
from llmkit.evaluation.identity import digest_of
from llmkit.evaluation.protocol import Documents
from llmkit.evaluation.shards import Shard, cut_questions, cut_units
from llmkit.evaluation.tasks import documents_of

Tasks = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """What one shard does.

    Attributes:
        subjects: benchmark -> its subjects here.
        tasks: lm-eval's leaf tasks here, by name.
        questions: task -> the questions that are scored here; empty where tasks stay whole.
        about: what the record says: index, count, and of the whole run each benchmark's and task's questions, the
            digest of its data, and how its metrics are put together.
    """

    subjects: Mapping[str, list[str]]
    tasks: Tasks
    questions: Mapping[str, list[int]]
    about: dict[str, Any] = field(default_factory=dict)


def cut_run(shard: Shard, benches: Mapping[str, Mapping[str, Documents]], loaded: Any, limit: float | None) -> Part:
    """The part of a run.

    Args:
        benches: benchmark -> subject -> its documents.
        loaded: what `load_lm_eval_tasks` gave; None for nothing.
        limit: as of `evaluate`.

    Raises:
        InputError: there are more shards than subjects.
    """
    tasks = {str(task.config.task): task for task in loaded["tasks"].values()} if loaded is not None else {}
    units = {(bench, name): docs for bench, some in benches.items() for name, docs in some.items()}
    units |= {("", name): documents_of(task) for name, task in tasks.items()}
    costs = {unit: list(_costs(docs.scored, limit)) for unit, docs in units.items()}
    about: dict[str, Any] = {
        "index": shard.index,
        "count": shard.count,
        "benches": {bench: {name: len(costs[bench, name]) for name in some} for bench, some in benches.items()},
        "tasks": {name: len(costs["", name]) for name in tasks},
        "data": digest_of([[unit, _digest(docs)] for unit, docs in units.items()]),
        "groups": _groups(loaded),
        "aggregations": {name: _aggregations(task) for name, task in tasks.items()},
    }
    if shard.count <= len(units):
        whole = {unit: sum(map(_cost, units[unit].shots)) + sum(each) for unit, each in costs.items()}
        mine = set(cut_units(whole, shard.count)[shard.index - 1])
        subjects = {bench: [name for name in some if (bench, name) in mine] for bench, some in benches.items()}
        return Part(subjects, {n: task for n, task in tasks.items() if ("", n) in mine}, {}, about)
    n_most = len(units) if benches else min(map(len, costs.values()))
    if shard.count > n_most:
        what = "subjects stay whole" if benches else "questions"
        hint = f"at most {n_most} shards: --shard 1/{n_most} to {n_most}/{n_most}"
        raise InputError(f"--shard {shard}: {n_most} {what}", hint=hint)
    _refuse_own_aggregations(shard, about["aggregations"], len(units))
    questions = {name: list(cut_questions(costs["", name], shard)) for name in tasks}
    return Part({}, {n: t for n, t in tasks.items() if questions[n]}, {n: q for n, q in questions.items() if q}, about)


def _refuse_own_aggregations(shard: Shard, aggregations: Mapping[str, Mapping[str, Any]], n_tasks: int) -> None:
    """Refuse to cut a task by questions whose metrics llmkit cannot put together."""
    for name, metrics in aggregations.items():
        if own := [metric for metric, function in metrics.items() if function is None]:
            raise InputError(
                f"--shard {shard}: {name} is not cut by questions: it puts {own[0]} together by a function of its own",
                hint=f"at most {n_tasks} shards" if n_tasks > 1 else "leave --shard out",
            )


def _costs(docs: Sequence[Mapping[str, Any]], limit: float | None) -> Iterator[int]:
    n = len(docs) if limit is None else math.ceil(len(docs) * limit) if limit < 1 else int(limit)
    return (_cost(doc) for doc in islice(docs, n))


def _cost(doc: Mapping[str, Any]) -> int:
    """Bytes of a document's text."""
    return sum(len(str(value).encode("utf-8", "replace")) for value in doc.values())


def _digest(docs: Documents) -> str:
    return digest_of([json.dumps(doc, sort_keys=True, default=str) for doc in docs.scored])


def _aggregations(task: Any) -> dict[str, str | None]:
    """How lm-eval puts each metric of a task together, by the registered name; None for a function of the task's."""
    names = {id(function): str(name) for name, function in AGGREGATION_REGISTRY.items()}
    return {str(metric): names.get(id(function)) for metric, function in task.aggregation().items()}


def _groups(loaded: Any) -> dict[str, Any]:
    """lm-eval's groups: their leaf tasks and how their metrics are averaged."""
    groups = loaded.get("groups") if isinstance(loaded, Mapping) else None
    return {
        str(name): {
            "tasks": [str(task.config.task) for task in group.get_all_tasks()],
            "metrics": [asdict(m) for m in group.aggregate_metric_list],
            "version": str(group.version),
        }
        for name, group in (groups or {}).items()
        if getattr(group, "aggregate_metric_list", None)
    }
