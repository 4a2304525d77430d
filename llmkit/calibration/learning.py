"""The squared error of a decoder block's output, and its gradient by the weights, for methods that learn a block."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from typing import TypeAlias

from llmkit.architecture.hooks import Weights
from llmkit.architecture.slots import Slot
from llmkit.architecture.storage import parts_of, stored
from llmkit.decoder.linear import Linear
from llmkit.lazy_imports import torch
from llmkit.tensors.constant import constant
from llmkit.tensors.stopped import raise_if_stopped

# (weights of a decoder, samples) -> the outputs of the block for them, [samples, S, hidden].
Compute: TypeAlias = "Callable[[Weights, list[int]], torch.Tensor]"


class BlockOutputError:
    """A `BlockError`: the outputs of one block, with given weights in place, beside those that it shall have.

    Args:
        compute: the block.
        weights: of the decoder, for all that is not given.
        targets: the outputs that are wanted, [samples, S, hidden].
        slots: of the weights that are given, by name.
        seed: of the samples that are drawn.
        report: told the share of the work that is done, and what was reached.
        dtype: of products, such as bfloat16; None for the compute dtype. The error itself is float32.
    """

    def __init__(
        self,
        compute: Compute,
        weights: Weights,
        targets: torch.Tensor,
        slots: Mapping[str, Slot],
        seed: str,
        report: Callable[[float, str], None],
        dtype: torch.dtype | None,
    ) -> None:
        self._compute, self._targets, self._slots, self.report = compute, targets, slots, report
        self._weights = KeptWeights(weights, {})
        self._random, self._drawn = random.Random(seed), list[int]()
        self._dtype = dtype
        self._beside: Mapping[str, torch.Tensor] = {}

    def with_weights(self, weights: Mapping[str, torch.Tensor]) -> BlockOutputError:
        """The same error with further weights replaced, by canonical id, each of its weight's shape."""
        error = copy(self)
        with torch.inference_mode(False):  # tensors of inference mode cannot be saved for gradients of others
            error._beside = {name: t.clone() if t.is_inference() else t for name, t in weights.items()}
        return error

    @property
    def n_samples(self) -> int:
        """Sequences whose outputs are compared."""
        return len(self._targets)

    def draw(self, n: int) -> list[int]:
        """`n` sample indices from a permutation, which is drawn anew once it is used up."""
        while len(self._drawn) < n:
            self._drawn += self._random.sample(range(self.n_samples), self.n_samples)
        samples, self._drawn = self._drawn[:n], self._drawn[n:]
        return samples

    def value(self, weights: Mapping[str, torch.Tensor], samples: Sequence[int]) -> list[float]:
        """The mean squared error over the outputs of each sample; weights [out, in] by name."""
        with torch.inference_mode(False), torch.no_grad():
            errors: list[float] = self._errors(self._by_id(weights), samples).tolist()
            return errors

    def gradient(
        self, weights: Mapping[str, torch.Tensor], samples: Sequence[int]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """The mean of these errors, and its gradient by each weight, float32 [out, in]."""
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors of inference mode have no gradient.
            leaves = {name: t.clone().requires_grad_() for name, t in self._by_id(weights).items()}
            error = self._errors(leaves, samples).mean()
            gradients = torch.autograd.grad(error, list(leaves.values()), allow_unused=True)
        by_id = {
            name: constant(torch.zeros_like(leaf) if gradient is None else gradient)
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }
        return error.item(), {name: stored(by_id, self._slots[name].upright).load() for name in weights}

    def _by_id(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Stored tensors as weights by canonical id."""
        return {
            part: lazy.load()
            for name, weight in weights.items()
            for part, lazy in parts_of(constant(weight), self._slots[name].upright).items()
        }

    def _errors(self, weights: Mapping[str, torch.Tensor], samples: Sequence[int]) -> torch.Tensor:
        raise_if_stopped()
        rows = list(samples)
        device = next(iter(weights.values())).device
        is_plain = self._dtype is None
        with nullcontext() if is_plain else torch.autocast(device.type, self._dtype, cache_enabled=False):
            outputs = self._compute(self._weights.replaced({**self._beside, **weights}), rows)
        return (outputs.float() - self._targets[rows].to(device)).square().mean((1, 2))


class KeptWeights:
    """Weights that are cached once read, some of them replaced."""

    def __init__(self, weights: Weights, held: dict[str, torch.Tensor] | None = None, stem: str = "") -> None:
        self._weights, self._held, self._stem = weights, {} if held is None else held, stem
        self._given: Mapping[str, torch.Tensor] = {}

    def replaced(self, replacements: Mapping[str, torch.Tensor]) -> KeptWeights:
        """The same weights with these replaced, by canonical id, each of its weight's shape."""
        weights = KeptWeights(self._weights, self._held, self._stem)
        weights._given = replacements
        return weights

    def __call__(self, leaf: str) -> torch.Tensor:
        name = self._stem + leaf
        if name in self._given:
            return self._given[name]
        if name not in self._held:
            self._held[name] = self._weights(leaf).clone()
        return self._held[name]

    def has(self, leaf: str) -> bool:
        return self._weights.has(leaf)

    def under(self, stem: str) -> KeptWeights:
        weights = KeptWeights(self._weights.under(stem), self._held, f"{self._stem}{stem}.")
        weights._given = self._given
        return weights

    def observed_linear(self, layer: Linear, names: Sequence[str]) -> Linear:
        return layer
