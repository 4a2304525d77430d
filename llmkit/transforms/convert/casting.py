"""Casts of whole checkpoints to another float dtype, with a count of what the new dtype cannot hold."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from llmkit.lazy_imports import torch
from llmkit.tensors.alike import Alike
from llmkit.tensors.finite import count_not_finite
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType

CAST_DTYPES = (DType.F32, DType.F16, DType.BF16)
_LARGEST = {DType.F64: 1.7976931348623157e308, DType.F32: 3.4028234663852886e38, DType.BF16: 3.3895313892515355e38,
            DType.F16: 65504.0}  # fmt: skip
_DTYPE_KEYS = ("torch_dtype", "dtype")


class Overflow:
    """Counts finite values that became infinite while tensors are cast; thread-safe.

    Give one to `convert(..., overflow=…)`, run the plan, then ask.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._n_rows: dict[str, int] = {}
        self._seen: dict[str, tuple[int, int]] = {}

    def expect(self, name: str, n_rows: int) -> None:
        """Tensor `name`, which has `n_rows` rows, will be cast."""
        self._n_rows[name] = n_rows
        self._seen[name] = (0, 0)

    def add(self, name: str, n_rows: int, n_overflown: int) -> None:
        """Some rows of a tensor were cast."""
        with self._guard:
            rows, values = self._seen[name]
            self._seen[name] = (rows + n_rows, values + n_overflown)

    def by_tensor(self) -> dict[str, int]:
        """Overflown values of each tensor that has any, most first."""
        with self._guard:
            # A tensor computed twice counts twice in rows and values.
            counts = {t: n * self._n_rows[t] // rows for t, (rows, n) in self._seen.items() if rows}
        return {name: n for name, n in sorted(counts.items(), key=lambda x: (-x[1], x[0])) if n}

    def uncounted(self) -> list[str]:
        """Tensors that an interrupted run had written already, so that nothing was counted."""
        with self._guard:
            return [name for name, (rows, _) in self._seen.items() if not rows and self._n_rows[name]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the manifest and `--json`; nothing where no cast could overflow."""
        if not self._n_rows:
            return {}
        counts = self.by_tensor()
        return {"overflow": {"total": sum(counts.values()), "tensors": counts, "uncounted": self.uncounted()}}


def cast(tensors: Mapping[str, Lazy], dtype: DType, overflow: Overflow) -> dict[str, Lazy]:
    """Every float tensor in `dtype`; integers, booleans and 8-bit floats stay as they are."""
    alike = Alike(lambda lazy, name: {"cast": _cast(name, lazy, dtype, overflow)})
    for name, lazy in tensors.items():
        if lazy.dtype.is_arithmetic and _LARGEST[dtype] < _LARGEST[lazy.dtype]:
            overflow.expect(name, lazy.spec.n_rows)
    return {
        name: alike(None, (lazy,), name)["cast"] if lazy.dtype.is_arithmetic else lazy for name, lazy in tensors.items()
    }


def _cast(name: str, lazy: Lazy, dtype: DType, overflow: Overflow) -> Lazy:
    if _LARGEST[dtype] >= _LARGEST[lazy.dtype]:
        return lazy.cast(dtype)

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.to(dtype.torch)
        n_not_finite = count_not_finite(y)
        n_overflown = n_not_finite - count_not_finite(x) if n_not_finite else 0
        overflow.add(name, len(x) if x.dim() else 1, n_overflown)
        return y

    return Apply("cast", [lazy], lazy.spec.with_dtype(dtype), fn, {"to": dtype.name}).output()


def config_with_dtype(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """The config saying that floats are stored as `dtype`, under the keys it uses."""
    keys = [k for k in _DTYPE_KEYS if k in config] or list(_DTYPE_KEYS[:1])
    return {**config, **dict.fromkeys(keys, dtype.torch_name)}
