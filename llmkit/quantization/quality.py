"""How far the quantized weights are from the float ones, and what they weigh."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.quantization.reading import dequantized
from llmkit.quantization.rtn import Observe
from llmkit.tensors.lazy import Context

__all__ = ["Measured", "Meter", "Sizes", "relative_errors", "sizes"]


@dataclass(frozen=True, slots=True)
class Measured:
    """The error of one weight: ‖W − W'‖ / ‖W‖ (Frobenius), 0 for an all-zero weight."""

    name: str
    relative_error: float


class Meter:
    """Collects errors while weights are quantized, so that no second pass over the data is needed.

    Give one to `quantize(..., meter=meter)`, run the plan, then ask. It may be told from several threads; sums do not
    depend on the order. A resumed run does not compute again what is already written: `unmeasured` names those.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._n_rows: dict[str, int] = {}
        self._seen: dict[str, list[tuple[float, float, int]]] = {}

    def observer(self, name: str, n_rows: int) -> Observe:
        """What the quantizer of weight `name`, with `n_rows` rows, reports to."""
        with self._guard:
            self._n_rows[name] = n_rows
            self._seen[name] = []

        def observe(squared_error: float, squared_norm: float, n: int) -> None:
            with self._guard:
                self._seen[name].append((squared_error, squared_norm, n))

        return observe

    def measured(self) -> list[Measured]:
        """The weights that were measured whole, in order of name."""
        with self._guard:
            return [
                Measured(name, _root_ratio(seen)) for name, seen in sorted(self._seen.items()) if self._is_whole(name)
            ]

    def worst(self, n: int = 5) -> list[Measured]:
        """The `n` weights with the largest relative error, worst first."""
        return sorted(self.measured(), key=lambda m: (-m.relative_error, m.name))[:n]

    def unmeasured(self) -> list[str]:
        """Weights whose error is not known: a resumed run found them written already."""
        with self._guard:
            return sorted(name for name in self._seen if not self._is_whole(name))

    def overall(self) -> float:
        """The relative error of all measured weights together."""
        with self._guard:
            return _root_ratio([s for name, seen in self._seen.items() if self._is_whole(name) for s in seen])

    def _is_whole(self, name: str) -> bool:
        n = sum(s[2] for s in self._seen[name])
        # A weight computed twice counts twice in both sums, which leaves their ratio as it is.
        return n > 0 and n % self._n_rows[name] == 0


def _root_ratio(seen: Iterable[tuple[float, float, int]]) -> float:
    seen = list(seen)
    norm = math.fsum(s[1] for s in seen)
    return math.sqrt(math.fsum(s[0] for s in seen) / norm) if norm else 0.0


def relative_errors(before: Checkpoint, after: Checkpoint, names: Iterable[str] | None = None) -> list[Measured]:
    """The errors of weights of `after` (quantized) against `before` (float), read again in row slices, worst first.

    Args:
        names: tensor names of the float model; default: every quantized weight.
    """
    import torch

    floats = dequantized(after)
    wanted = [n for n in floats.tensors if n not in after.tensors] if names is None else list(names)
    found = []
    for name in wanted:
        ours, theirs = floats.tensors[name], before.tensors[name]
        sums = []
        for start, stop in _slices(ours.node.n_rows, ours.node.row_step, ours.spec.row_nbytes):
            w = Context().rows(theirs, (start, stop)).double()
            error = Context().rows(ours, (start, stop)).double().sub_(w)
            sums.append((float(torch.sum(error * error)), float(torch.sum(w * w)), stop - start))
        found.append(Measured(name, _root_ratio(sums)))
    return sorted(found, key=lambda m: (-m.relative_error, m.name))


def _slices(n_rows: int, step: int | None, row_nbytes: int) -> list[tuple[int, int]]:
    if step is None:
        return [(0, n_rows)]
    n = max(2**22 // max(row_nbytes, 1) // step, 1) * step
    return [(start, min(start + n, n_rows)) for start in range(0, n_rows, n)]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of all tensors before and after, and stored bits for each weight.

    Attributes:
        n_parameters: elements of the float model.
        n_quantized: elements of the quantized weights.
        bits_per_weight: of the whole model, embeddings and head included.
        linear_bits_per_weight: of the quantized weights, scales and zero points included.
    """

    before_nbytes: int
    after_nbytes: int
    n_parameters: int
    n_quantized: int
    bits_per_weight: float
    linear_bits_per_weight: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {name: getattr(self, name) for name in self.__slots__}


def sizes(before: Checkpoint, after: Checkpoint) -> Sizes:
    """What quantization saved, from specs alone."""
    n_parameters = sum(t.spec.numel for t in before.tensors.values())
    replaced = [t.spec for name, t in before.tensors.items() if name not in after.tensors]
    added = [t.spec for name, t in after.tensors.items() if name not in before.tensors]
    n_quantized = sum(s.numel for s in replaced)
    return Sizes(
        before_nbytes=before.nbytes,
        after_nbytes=after.nbytes,
        n_parameters=n_parameters,
        n_quantized=n_quantized,
        bits_per_weight=8 * after.nbytes / n_parameters if n_parameters else 0.0,
        linear_bits_per_weight=8 * sum(s.nbytes for s in added) / n_quantized if n_quantized else 0.0,
    )
