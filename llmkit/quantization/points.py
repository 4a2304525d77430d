"""Numbers that codes stand for where they are no integers: the points of nf4, fp4 and float8.

A weight is `values[code] * scale`; the scale of a group puts its largest weight on the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from llmkit.lazy_imports import torch
from llmkit.tensors.device import CPU, default_device
from llmkit.tensors.spec import DType

# Places of the table that tells which values a number lies between: finer than the two closest bounds of FP4.
_N_PLACES = 1024


@dataclass(frozen=True)
class Points:
    """Values of codes, the same for all groups.

    Attributes:
        name: as `--type` spells it.
        bits: of a code.
        values: of the codes 0, 1, …; NaN for one that stands for no number.
        dtype: of which `values` are all there are, and the codes its bytes; None for a table.
        is_wide: values are multiplied by scales in float32 and rounded once; otherwise in the wanted dtype, which holds
            them exactly.
    """

    name: str
    bits: int
    values: tuple[float, ...] = field(repr=False)
    dtype: DType | None = None
    is_wide: bool = True

    @cached_property
    def largest(self) -> float:
        """The largest size of a value."""
        return max(abs(value) for value in self.values if value == value)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The code of the value nearest to each of float32 numbers of any shape, uint8; of two, the lower value."""
        if self.dtype is not None:  # to the nearest, and of two the one whose last bit is 0
            return x.clamp(-self.largest, self.largest).to(self.dtype.torch).view(torch.uint8)
        ranks, bounds, order = (part.to(x.device) for part in self._search)
        places = self._places(x)
        rank = ranks.index_select(0, places).add_(x.reshape(-1) > bounds.index_select(0, places))
        return order.index_select(0, rank).view(x.shape)

    def numbers(self, codes: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values of codes, uint8 of any shape; float32 where no dtype is given."""
        table = self._table.to(codes.device, dtype or torch.float32)
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)

    @cached_property
    def _table(self) -> torch.Tensor:
        return torch.tensor(self.values, device=CPU)

    def _places(self, x: torch.Tensor) -> torch.Tensor:
        """Where numbers lie in the range of the values, 0 to `_N_PLACES`; rising with them."""
        half = _N_PLACES / 2
        places = torch.mul(x.reshape(-1), half / self.largest).add_(half)
        return places.clamp_(0, _N_PLACES).int()

    @cached_property
    def _search(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each place how many bounds between values lie below it, and the one in it; and codes by rising values.

        `torch.bucketize` gives the same, and takes ten times as long.
        """
        with default_device(CPU):
            order = sorted(range(len(self.values)), key=lambda code: self.values[code])
            ordered = self._table[order]
            bounds = (ordered[1:] + ordered[:-1]) / 2
            places = self._places(bounds)
            every = torch.arange(_N_PLACES + 1, dtype=places.dtype)
            in_place = torch.full((len(every),), torch.inf)
            in_place[places] = bounds
            below = torch.searchsorted(places, every).int()
            return below, in_place, torch.tensor(order, dtype=torch.uint8)


def _float8() -> tuple[float, ...]:
    """The values of float8 e4m3 without infinities: 4 bits of exponent with a bias of 7, 3 of mantissa."""
    positive = [
        (mantissa / 8 if exponent == 0 else 1 + mantissa / 8) * 2.0 ** max(exponent - 7, -6)
        for exponent in range(16)
        for mantissa in range(8)
    ]
    positive[-1] = float("nan")
    return (*positive, *(-value for value in positive))


_OF_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_OF_FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
)  # fmt: skip
_OF_MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314), and 2 bits of exponent and 1 of mantissa
# with the largest value scaled to 1, both as bitsandbytes has them; its codes of fp4 do not rise with their values.
NF4 = Points("nf4", 4, _OF_NF4)
FP4 = Points("fp4", 4, (*_OF_FP4, *(-value for value in _OF_FP4)))
FP8 = Points("fp8", 8, _float8(), dtype=DType.F8_E4M3, is_wide=False)
MXFP4 = Points("mxfp4", 4, (*_OF_MXFP4, *(-value for value in _OF_MXFP4)))
