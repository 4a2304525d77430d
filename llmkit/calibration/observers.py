"""What is summed up of the inputs of linear layers while they pass."""

from __future__ import annotations

from collections.abc import Collection

from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.statistics import Statistics

MEASURED = ("second_moments", "cross_moments", "squares", "maxima", "inputs")


class Observer:
    """Sums over the inputs x [tokens, in] of one layer, or of several that share them.

    Args:
        measured: fields of `Statistics` to fill.

    Raises:
        SpecError: a field that is not there.
    """

    def __init__(self, measured: Collection[str]) -> None:
        unknown = [name for name in measured if name not in MEASURED]
        if unknown:
            raise SpecError(f"no observer measures {unknown[0]!r}; there are {', '.join(MEASURED)}")
        self._measured = frozenset(measured)
        self._n_tokens = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._inputs: list[torch.Tensor] = []

    def see(self, x: torch.Tensor, float_x: torch.Tensor | None = None) -> None:
        """Take in x [tokens, in]; sums are float32.

        Args:
            float_x: the same inputs in the float model, for `cross_moments`; None: they do not differ.
        """
        x = x.float()
        self._n_tokens += len(x)
        if "second_moments" in self._measured:
            self._add("second_moments", x.T @ x)
        if "cross_moments" in self._measured and float_x is not None:
            self._add("cross_moments", (float_x.float() - x).T @ x)
        if "squares" in self._measured:
            self._add("squares", x.square().sum(0))
        if "maxima" in self._measured:
            largest = x.abs().amax(0)
            known = self._sums.get("maxima")
            self._sums["maxima"] = largest if known is None else largest.maximum(known)
        if "inputs" in self._measured:
            self._inputs.append(x.clone())

    def _add(self, name: str, more: torch.Tensor) -> None:
        known = self._sums.get(name)
        self._sums[name] = more if known is None else known.add_(more)

    def statistics(self) -> Statistics:
        """What was seen so far."""
        inputs = torch.cat(self._inputs) if self._inputs else None
        return Statistics(self._n_tokens, inputs=inputs, **self._sums)
