"""What is summed up of the inputs of linear layers while they pass."""

from __future__ import annotations

from collections.abc import Collection

from llmkit.errors import SpecError
from llmkit.lazy_imports import torch
from llmkit.quantization.statistics import Statistics
from llmkit.tensors.device import CPU
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.stopped import raise_if_stopped

_N_TOKENS = 1024  # at a time: products of many more are slower
_N_COLUMNS = 192  # of second moments at a time: what lies below the diagonal is not computed
MEASURED = ("second_moments", "cross_moments", "squares", "maxima", "inputs")


class Observer:
    """Sums over the inputs x [tokens, in] of one layer, or of several that share them.

    Args:
        measured: fields of `Statistics` to fill.
        weight: [out, in], of the only layer that has these inputs. Where it has few outputs, `cross_products` are
            summed up in place of `cross_moments`, which takes less work.

    Raises:
        SpecError: a field that is not there.
    """

    def __init__(self, measured: Collection[str], weight: Lazy | None = None) -> None:
        unknown = [name for name in measured if name not in MEASURED]
        if unknown:
            raise SpecError(f"no observer measures {unknown[0]!r}; there are {', '.join(MEASURED)}")
        self._measured = frozenset(measured)
        self._narrow = weight if weight is not None and 2 * weight.shape[0] < weight.shape[1] else None
        self._n_tokens = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._inputs: list[torch.Tensor] = []
        self._loaded: torch.Tensor | None = None

    def see(self, x: torch.Tensor, float_x: torch.Tensor | None = None) -> None:
        """Take in x [tokens, in], of any number of tokens; sums are float32.

        Args:
            float_x: the same inputs in the float model, for `cross_moments`; None: they do not differ. Both are
                compared in its dtype, so that rounding is no difference.
        """
        self._n_tokens += len(x)
        for start in range(0, max(len(x), 1), _N_TOKENS):
            raise_if_stopped()
            some, difference = x[start : start + _N_TOKENS], None
            if float_x is not None:
                difference = float_x[start : start + _N_TOKENS].to(x.device).float() - some.to(float_x.dtype)
            self._see(some.float(), difference)

    def _see(self, x: torch.Tensor, difference: torch.Tensor | None) -> None:
        if "second_moments" in self._measured:
            self._add_square(x)
        if "cross_moments" in self._measured and difference is not None:
            if (weight := self._weight(x.device)) is None:
                self._add_product("cross_moments", difference, x)
            else:
                self._add_product("cross_products", difference @ weight.T, x)
        if "squares" in self._measured:
            self._add("squares", x.square().sum(0))
        if "maxima" in self._measured:
            largest = x.abs().amax(0) if len(x) else x.new_zeros(x.shape[1])
            known = self._sums.get("maxima")
            self._sums["maxima"] = largest if known is None else largest.maximum(known)
        if "inputs" in self._measured:
            self._inputs.append(x.clone())

    def _weight(self, device: torch.device) -> torch.Tensor | None:
        """The weight of a layer with few outputs, float32; None of another."""
        if self._narrow is not None and self._loaded is None:
            self._loaded = self._narrow.load().to(device).float()
        return self._loaded

    def _add_square(self, x: torch.Tensor) -> None:
        """The sum of x x^T over tokens: on the CPU what lies on and above the diagonal, at two thirds of the cost."""
        n_in = x.shape[1]
        sums = self._sums.setdefault("second_moments", x.new_zeros((n_in, n_in)))
        for some in _panels(sums):
            sums[some, some.start :].addmm_(x[:, some].T, x[:, some.start :])

    def _add_product(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """The sum of a b^T over tokens."""
        if name in self._sums:
            self._sums[name].addmm_(a.T, b)
        else:
            self._sums[name] = a.T @ b

    def _add(self, name: str, more: torch.Tensor) -> None:
        known = self._sums.get(name)
        self._sums[name] = more if known is None else known.add_(more)

    def statistics(self) -> Statistics:
        """What was seen so far."""
        if (sums := self._sums.get("second_moments")) is not None:
            with torch.inference_mode():  # in which they were made
                for some in _panels(sums):
                    sums[some.stop :, some] = sums[some, some.stop :].T
        inputs = torch.cat(self._inputs) if self._inputs else None
        return Statistics(self._n_tokens, inputs=inputs, **self._sums)


def _panels(sums: torch.Tensor) -> list[slice]:
    """The rows of a symmetric matrix that are computed at a time; another device than the CPU takes all at once."""
    n, step = len(sums), _N_COLUMNS if sums.device.type == CPU else len(sums)
    return [slice(start, min(start + step, n)) for start in range(0, n, max(step, 1))]
