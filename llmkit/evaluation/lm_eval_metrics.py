"""lm-eval's own averages, of values that records hold.

Imported only where a task's questions, or a group's tasks, were scored by several shards: it needs lm-eval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.metrics import stderr_for_metric
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.config.group import AggMetricConfig

from llmkit.errors import InputError
from llmkit.evaluation.execution import BOOTSTRAP_ITERS


def task_metrics(
    name: str, columns: Mapping[str, Sequence[Any]], aggregations: Mapping[str, str | None]
) -> dict[str, Any]:
    """A task's metrics with their standard errors.

    Args:
        columns: `metric,filter` -> the value of each question.
        aggregations: metric -> the registered name of what puts its values together.

    Raises:
        InputError: a task puts a metric together by a function of its own.
    """
    results: dict[str, Any] = {}
    for key, values in columns.items():
        metric, _, rest = key.partition(",")
        registered = aggregations.get(metric)
        if registered is None:
            raise InputError(
                f"{name} puts {metric} together by a function of its own, which no record holds",
                hint="score this task in one piece",
            )
        items = [tuple(v) if isinstance(v, list) else v for v in values]
        try:
            function = AGGREGATION_REGISTRY[registered]
            results[key] = float(function(items))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{name}: {key} cannot be put together by {registered}: {error}") from error
        stderr = stderr_for_metric(metric=function, bootstrap_iters=BOOTSTRAP_ITERS)
        if stderr is not None and len(items) > 1:
            results[f"{metric}_stderr,{rest}"] = float(stderr(items))
    return results


def group_metrics(name: str, group: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """A group's metrics from those of its tasks, by lm-eval's `Group.aggregate`."""
    try:
        stand_in = _Leaves(name, aggregate_metric_list=[AggMetricConfig(**m) for m in group["metrics"]])
        stand_in.leaves = [SimpleNamespace(task_name=task) for task in group["tasks"]]
        found = stand_in.aggregate(dict(tasks))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{name}: its metrics cannot be averaged: {error}") from error
    kept = {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    shots = [tasks[task].get("shots") for task in group["tasks"]]
    return {k: float(v) if "," in k else v for k, v in kept.items()} | {
        "version": group["version"],
        "shots": shots[0] if shots and all(n == shots[0] for n in shots) else None,
    }


class _Leaves(Group):  # type: ignore[misc]
    """A group that knows its tasks by name alone."""

    leaves: list[Any] = []  # noqa: RUF012 - set for each

    def get_all_tasks(self, recursive: bool = True) -> list[Any]:
        return self.leaves
