"""The weights of one block multiplied by scales of their inputs, which what comes before takes off: the same function.

Which layers read what, `llmkit.architecture.folds` tells; how large a scale is, a `ScalingMethod`, from the inputs that
layers have while their block computes with its float weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmkit.architecture.folds import Fold, folds
from llmkit.architecture.hooks import Weights
from llmkit.architecture.model import Model
from llmkit.architecture.slots import Slot
from llmkit.architecture.storage import stored
from llmkit.calibration.blocks import Blocks
from llmkit.calibration.learning import KeptWeights
from llmkit.calibration.observers import Observer
from llmkit.errors import listing
from llmkit.lazy_imports import torch
from llmkit.quantization.codec import error_context
from llmkit.quantization.method import ScalingMethod, Task
from llmkit.tensors.constant import constant
from llmkit.tensors.device import CPU, default_device
from llmkit.tensors.finite import require_finite
from llmkit.tensors.lazy import Lazy


@dataclass(frozen=True)
class ScaledBlock:
    """One block with scaled weights.

    Attributes:
        blocks: compute it with them.
        tasks: those of the block, with the weights that are to be quantized now.
        changed: the other tensors that changed, as they are stored.
    """

    blocks: Blocks
    tasks: Mapping[str, Task]
    changed: Mapping[str, torch.Tensor]


class BlockScaling:
    """What is scaled in one block.

    Args:
        tensors: of the float model.
        tasks: those of the block, by name.

    Attributes:
        folds: those that are used: every layer that reads the input is quantized by one scaling method, and so is a
            linear layer that makes it.
    """

    def __init__(self, model: Model, layer: int, tensors: Mapping[str, Lazy], tasks: Mapping[str, Task]) -> None:
        self._layer, self._tensors, self._tasks = layer, tensors, tasks
        self._slot_of = {part.id: s for s in model.slots.values() if s.layer == layer for part in s.parts}
        self.folds = [fold for fold in folds(model, layer) if self._is_used(fold)]

    def _is_used(self, fold: Fold) -> bool:
        linear = fold.weights if fold.norm is not None else (fold.source_leaves[0], *fold.weights)
        tasks = [self._tasks.get(self._slot_of[weight].name) for weight in linear]
        methods = {task.method if task is not None else None for task in tasks}
        return len(methods) == 1 and isinstance(methods.pop(), ScalingMethod)

    @property
    def changed(self) -> list[Slot]:
        """The tensors that change besides those that are quantized: norms, biases."""
        leaves = [leaf for fold in self.folds for leaf in fold.source_leaves if leaf in self._slot_of]
        slots = {self._slot_of[leaf].id: self._slot_of[leaf] for leaf in leaves}
        return [slot for slot in slots.values() if slot.name not in self._tasks]

    @property
    def unscaled(self) -> list[str]:
        """Names of the weights whose inputs have no fold, and so no scale."""
        scaled = {self._slot_of[weight].name for fold in self.folds for weight in fold.weights}
        return [name for name, t in self._tasks.items() if isinstance(t.method, ScalingMethod) and name not in scaled]

    def applied(self, blocks: Blocks, hidden: torch.Tensor) -> ScaledBlock:
        """The block with scales for its inputs, from the hidden states before it, [B, S, hidden]."""
        if not self.folds:
            return ScaledBlock(blocks, self._tasks, {})
        chosen = _Choosing(self.folds, self._choice(blocks.weights))
        blocks.run(self._layer, hidden.clone(), chosen)
        weights = KeptWeights(blocks.weights, {})
        replacements: dict[str, torch.Tensor] = {}
        dtypes = {part: self._tensors[slot.name].dtype.torch for part, slot in self._slot_of.items()}
        for fold, scale in chosen.scales.items():
            replacements |= folded_weights(fold, scale, weights.replaced(replacements), dtypes)
        new = weights.replaced(replacements)

        def whole(slot: Slot) -> Lazy:
            return stored({part.id: constant(new(part.id)) for part in slot.parts}, slot)

        tasks = dict(self._tasks)
        for slot in {self._slot_of[leaf].id: self._slot_of[leaf] for leaf in replacements}.values():
            if slot.name in tasks:  # a task's weight is [out, in]
                tasks[slot.name] = replace(tasks[slot.name], weight=whole(slot.upright))
        changed = {slot.name: whole(slot).cast(self._tensors[slot.name].dtype).load().to(CPU) for slot in self.changed}
        return ScaledBlock(blocks.with_weights(new), tasks, changed)

    def _choice(self, weights: Weights) -> Callable[[Fold, Observer], torch.Tensor]:
        def scale(fold: Fold, observer: Observer) -> torch.Tensor:
            tasks = [self._tasks[self._slot_of[weight].name] for weight in fold.weights]
            statistics, method = observer.statistics(), tasks[0].method
            if not isinstance(method, ScalingMethod):
                raise TypeError(f"{method.name} has no scales")
            read = []
            for task, leaf in zip(tasks, fold.weights, strict=True):
                weight = weights(leaf)
                require_finite(weight, weight.abs().amax(), name=task.name)
                read.append(task.block_weight(weight, statistics))
            with error_context(listing([task.name for task in tasks], 3)), default_device(tasks[0].device):
                return method.input_scales(read, fold.source_of(read[0].weight.shape[1]))

        return scale


class _Choosing:
    """A block hook that chooses the input scales of each fold.

    Attributes:
        scales: of the outputs of each fold's source, in the order in which they are computed.
    """

    def __init__(self, used: Sequence[Fold], choose: Callable[[Fold, Observer], torch.Tensor]) -> None:
        self._fold_of = {weight: fold for fold in used for weight in fold.weights}
        self._choose = choose
        self._observers: dict[Fold, Observer] = {}
        self.scales: dict[Fold, torch.Tensor] = {}

    def _open(self, weights: Sequence[str]) -> Fold | None:
        """The fold of these layers whose scale isn't chosen; the first product that reads an input tells all of it."""
        fold = self._fold_of.get(weights[0])
        return fold if fold is not None and fold not in self.scales else None

    def see(self, weights: Sequence[str], x: torch.Tensor, float_x: torch.Tensor | None) -> None:
        fold = self._open(weights)
        if fold is not None:
            self._observers.setdefault(fold, Observer({"second_moments"})).see(x)

    def settle(self, weights: Sequence[str], values: torch.Tensor) -> torch.Tensor:
        fold = self._open(weights)
        if fold is not None and fold in self._observers:  # without, no token reached it
            self.scales[fold] = self._choose(fold, self._observers.pop(fold))
        return values


def folded_weights(
    fold: Fold, scale: torch.Tensor, weights: Weights, dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """The weights of a fold with a scale in place, by id, float32; what computes with all of them gives the same.

    The weight of a norm and a bias are rounded to the dtype they are stored in; columns are multiplied by what a
    rounded norm really takes off. A channel whose quotient that dtype does not hold has no scale.

    Args:
        scale: float32 [outputs of the source], above 0.
        weights: of the decoder, by id, float32.
        dtypes: in which weights are stored, by id.
    """
    leaf, bias_leaf = fold.source_leaves
    source, taken_off = weights(leaf), scale
    if fold.norm is not None:
        offset = getattr(fold.norm, "offset", 0.0)
        divided = (((source + offset) / scale) - offset).to(dtypes[leaf]).float()
        taken_off = (source + offset) / (divided + offset)
        is_held = taken_off.isfinite() & (taken_off > 0)
    else:
        divided, is_held = source / scale.unsqueeze(1), torch.ones_like(scale, dtype=torch.bool)
    changed = {}
    if weights.has(bias_leaf):
        bias = weights(bias_leaf)
        quotient = (bias / taken_off).to(dtypes[bias_leaf]).float()
        is_held &= quotient.isfinite()
        changed[bias_leaf] = quotient.where(is_held, bias)
    changed[leaf] = divided.where(is_held if fold.norm is not None else is_held.unsqueeze(1), source)
    columns = taken_off.where(is_held, 1.0)
    changed |= {weight: weights(weight) * columns[fold.source_of(weights(weight).shape[1])] for weight in fold.weights}
    return changed
