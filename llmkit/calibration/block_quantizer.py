"""Quantizes the linear layers of one decoder block while its inputs pass: each for the inputs that it will have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from llmkit.architecture.slots import Part, Slot, is_of_expert
from llmkit.architecture.storage import parts_of
from llmkit.calibration.blocks import Blocks
from llmkit.calibration.learning import BlockOutputError
from llmkit.calibration.observers import MEASURED, Observer
from llmkit.calibration.output_moments import output_moments
from llmkit.calibration.products import exact_products
from llmkit.calibration.ranks import Ranks
from llmkit.errors import RequirementError
from llmkit.lazy_imports import torch
from llmkit.quantization.method import BlockMethod, BlockWeight, QuantizedRows, Task
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.constant import constant
from llmkit.tensors.device import CPU, default_device, to_device
from llmkit.tensors.finite import count_not_finite, require_finite
from llmkit.tensors.stopped import raise_if_stopped

_NO_TOKEN = "no token of the text reached them, so that all of their inputs count alike"


class BlockQuantizer:
    """Quantizes the layers of one block: as their inputs become complete, or all together once those were seen.

    Attributes:
        results, errors: the parts of each matrix, and its squared error and norm.
        learnt: the weights for a `BlockMethod`, until `learn` has quantized them.
    """

    def __init__(self, tasks: Mapping[str, Task], slots: Mapping[str, Slot], ranks: Ranks) -> None:
        self._tasks, self._slots, self._ranks = tasks, slots, ranks
        self._of_weight = {part.id: name for name in tasks for part in slots[name].parts}
        self._n_rows = {part.id: part.shape[0] for slot in slots.values() for part in slot.parts if part.shape}
        self._observers: dict[tuple[str, ...], Observer] = {}
        self.results: dict[str, torch.Tensor] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self.notes: dict[str, str] = {}
        self.learnt: dict[str, BlockWeight] = {}
        self._restored: dict[str, torch.Tensor] = {}
        self._output_moments: dict[str, torch.Tensor] = {}

    def trace(self, blocks: Blocks, index: int, hidden: torch.Tensor, samples: Sequence[int]) -> None:
        """Measure the output moments of the weights whose methods use them."""
        names = [name for name, task in self._tasks.items() if "output_moments" in task.method.uses]
        asked = [part.id for name in names for part in traced_parts(self._slots[name])]
        if asked:
            self._output_moments = output_moments(blocks, index, hidden, samples, asked, self._n_rows)

    def _with_outputs(self, task: Task, statistics: Statistics | None, owner: int) -> Statistics | None:
        """The statistics with the output moments of a matrix, all ranks' taken together, where those are numbers."""
        slot = self._slots[task.name]
        ids = {part.id for part in traced_parts(slot)}
        if statistics is None or not ids or not ids <= self._output_moments.keys():
            return statistics
        rows_of_part = parts_of(constant(torch.arange(task.weight.shape[0]).unsqueeze(1)), slot.upright)
        moments = torch.zeros(2 * task.weight.shape[:1])
        for part, rows in rows_of_part.items():
            own = rows.load().squeeze(1)
            moments[own.unsqueeze(1), own] = self._output_moments[part].to(CPU)
        summed = self._ranks.summed(Statistics(0, output_moments=moments), {owner}).output_moments
        if summed is None or count_not_finite(summed):  # of weights behind this one, whose own turn comes
            return statistics
        return to_device(replace(statistics, output_moments=summed), task.device)

    def _named(self, weights: Sequence[str]) -> list[Task]:
        names = dict.fromkeys(self._of_weight[weight] for weight in weights if weight in self._of_weight)
        return [self._tasks[name] for name in names]

    def see(self, weights: Sequence[str], x: torch.Tensor, float_x: torch.Tensor | None) -> None:
        tasks = [task for task in self._named(weights) if task.name not in self.errors]
        if tasks:
            self._observers.setdefault(tuple(weights), _observer(tasks)).see(x, float_x)

    def settle(self, weights: Sequence[str], values: torch.Tensor) -> torch.Tensor:
        tasks = self._named(weights)
        if not tasks:
            return values
        open_tasks = [task for task in tasks if task.name not in self.errors]
        owners = [
            0 if isinstance(task.method, BlockMethod) else (len(self.errors) + i) % self._ranks.n
            for i, task in enumerate(open_tasks)
        ]
        statistics = None
        if open_tasks:
            observer = self._observers.pop(tuple(weights), None) or _observer(open_tasks)
            observer.see(values.new_empty((0, values.shape[1])))  # no token may have reached it
            statistics = self._ranks.summed(observer.statistics(), set(owners))
            statistics = to_device(statistics, tasks[0].device)  # once for all: what is derived of them is shared
        for task, owner in zip(open_tasks, owners, strict=True):
            raise_if_stopped()
            start = None
            if not isinstance(task.method, BlockMethod) or task.method.starts_in_order:
                known = self._with_outputs(task, statistics, owner)
                start = self._ranks.by(owner, partial(_quantized, task, known))
                self._take(task, start)
            if isinstance(task.method, BlockMethod) and self._ranks.index == owner:
                weight = task.weight.load()
                require_finite(weight, weight.abs().amax(), name=task.name)
                self.learnt[task.name] = task.block_weight(weight, statistics, start)
                if statistics is not None and not statistics.n_tokens:
                    self.notes[task.name] = _NO_TOKEN
        rows_of_each = values.split([self._n_rows[weight] for weight in weights])
        current = [self._restored.get(weight, rows) for weight, rows in zip(weights, rows_of_each, strict=True)]
        return torch.cat([rows.to(values.device, values.dtype) for rows in current])

    def learn(self, error: BlockOutputError) -> None:
        """Quantize the weights that are learnt together; those that are settled by now are in their places."""
        methods = {self._tasks[name].method: None for name in self.learnt}
        for method in methods:
            names = [name for name in self.learnt if self._tasks[name].method is method]
            if isinstance(method, BlockMethod):
                block_weights = {name: self.learnt.pop(name) for name in names}
                device = self._tasks[names[0]].device
                beside = {weight: values.to(device) for weight, values in self._restored.items()}
                with default_device(device):
                    learnt = method.quantize_block(block_weights, error.with_weights(beside))
                for name, rows in learnt.items():
                    self._take(self._tasks[name], to_device(rows, CPU))

    def _take(self, task: Task, rows: QuantizedRows) -> None:
        """Keep the parts of a matrix, and compute with it from now on."""
        parts = task.parts(rows)
        self.results |= {f"{task.name}.{part}": tensor for part, tensor in parts.items()}
        self.errors[task.name] = rows.squared_error, rows.squared_norm
        if rows.note:
            self.notes[task.name] = rows.note
        restored = task.matrix(map(constant, parts.values())).dequantized(task.scale_dtype)
        parts_by_weight = parts_of(restored, self._slots[task.name].upright)  # a task's weight is [out, in]
        self._restored |= {w: lazy.load() for w, lazy in parts_by_weight.items()}

    def require_all(self) -> None:
        """Refuse a layer that the decoder never called.

        Raises:
            RequirementError: naming it.
        """
        missing = [name for name in self._tasks if name not in self.errors and name not in self.learnt]
        if missing:
            raise RequirementError(
                f"{missing[0]} has inputs that calibration does not see",
                hint=f"leave it in floats: --keep {missing[0].removesuffix('.weight')}",
            )


def traced_parts(slot: Slot) -> list[Part]:
    """The weights of a stored tensor whose output moments are measured: no more outputs than inputs, and no expert."""
    are_few = all(part.shape and part.shape[0] <= part.shape[1] and not is_of_expert(part.id) for part in slot.parts)
    return list(slot.parts) if are_few else []


def _observer(tasks: Sequence[Task]) -> Observer:
    measured = frozenset[str]().union(*(task.method.needs | task.method.uses for task in tasks))
    return Observer(measured.intersection(MEASURED), tasks[0].weight if len(tasks) == 1 else None)


def _quantized(task: Task, statistics: Statistics | None) -> QuantizedRows:
    with exact_products():
        rows = task.quantize(task.weight.load(), statistics)
    return rows if statistics is None or statistics.n_tokens else replace(rows, note=_NO_TOKEN)
