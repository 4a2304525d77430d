"""Errors of quantized weights, and their sizes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmkit.quantization.method import Observe
from llmkit.tensors.lazy import Lazy


@dataclass(frozen=True, slots=True)
class WeightError:
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

    def expect(self, name: str, n_rows: int) -> None:
        """Weight `name`, with `n_rows` rows, will be quantized."""
        with self._guard:
            self._n_rows[name] = n_rows

    def observer(self, name: str, n_rows: int) -> Observe:
        """The observer that the quantizer of weight `name`, with `n_rows` rows, calls."""
        self.expect(name, n_rows)

        def observe(squared_error: float, squared_norm: float, n: int) -> None:
            with self._guard:
                self._seen.setdefault(name, []).append((squared_error, squared_norm, n))

        return observe

    def measured(self) -> list[WeightError]:
        """The weights that were measured whole, in order of name."""
        with self._guard:
            return [
                WeightError(name, _root_ratio(seen))
                for name, seen in sorted(self._seen.items())
                if self._is_whole(name)
            ]

    def worst(self, n: int = 5) -> list[WeightError]:
        """The `n` weights with the largest relative error, worst first."""
        return sorted(self.measured(), key=lambda m: (-m.relative_error, m.name))[:n]

    def unmeasured(self) -> list[str]:
        """Weights without a measured error: an earlier run wrote them."""
        with self._guard:
            return sorted(name for name in self._n_rows if not self._is_whole(name))

    def overall(self) -> float:
        """The relative error of all measured weights together."""
        with self._guard:
            return _root_ratio([s for name, seen in self._seen.items() if self._is_whole(name) for s in seen])

    def _is_whole(self, name: str) -> bool:
        n = sum(s[2] for s in self._seen.get(name, ()))
        # A weight computed twice counts twice in both sums, which leaves their ratio as it is.
        return n > 0 and n % self._n_rows[name] == 0


def _root_ratio(seen: Iterable[tuple[float, float, int]]) -> float:
    seen = list(seen)
    norm = math.fsum(s[1] for s in seen)
    return math.sqrt(math.fsum(s[0] for s in seen) / norm) if norm else 0.0


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
        return asdict(self)


def sizes(before: Mapping[str, Lazy], after: Mapping[str, Lazy]) -> Sizes:
    """Sizes before and after quantization, from specs alone."""
    n_parameters = sum([t.spec.numel for t in before.values()])
    # Codes may have the name that the weight had.
    kept = {name for name, t in before.items() if name in after and after[name].spec == t.spec}
    n_quantized = sum([t.spec.numel for name, t in before.items() if name not in kept])
    added_nbytes = sum([t.spec.nbytes for name, t in after.items() if name not in kept])
    after_nbytes = sum([t.spec.nbytes for t in after.values()])
    return Sizes(
        before_nbytes=sum(t.spec.nbytes for t in before.values()),
        after_nbytes=after_nbytes,
        n_parameters=n_parameters,
        n_quantized=n_quantized,
        bits_per_weight=8 * after_nbytes / n_parameters if n_parameters else 0.0,
        linear_bits_per_weight=8 * added_nbytes / n_quantized if n_quantized else 0.0,
    )
