"""How two checkpoints differ: names, shapes, dtypes, and every tensor's values, read in row slices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized import dequantized
from llmkit.errors import LlmkitError
from llmkit.lazy_imports import torch
from llmkit.pipeline.pool import default_workers
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.quantization.matrix import is_dequantized
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.slices import common_slices, load_rows
from llmkit.tensors.spec import DType

# Read in slices; computed in blocks whose float64 copies stay in the caches.
_SLICE_NBYTES = 8 * 2**20
_BLOCK_NUMEL = 2**16


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor of B is from that of A.

    Attributes:
        max_abs: largest |b - a|; NaN when one side has a NaN where the other has none.
        relative_l2: ‖b - a‖ / ‖a‖; infinite when a is all zero and b is not.
        cosine: of the angle between the two; None when one is all zero.
        n_changed: elements that are not equal.
    """

    name: str
    dtype_a: str
    dtype_b: str
    shape: tuple[int, ...]
    max_abs: float
    relative_l2: float
    cosine: float | None
    n_changed: int

    @property
    def severity(self) -> tuple[bool, float, float]:
        """Sort key: NaN first, then the relative difference, then the absolute one."""
        return (math.isnan(self.max_abs) or math.isnan(self.relative_l2), self.relative_l2, self.max_abs)


@dataclass(frozen=True)
class Comparison:
    """What `llmkit diff` shows.

    Attributes:
        architectures: what A and B say that they are, where that differs; else empty.
        removed: names only in A.
        added: names only in B.
        unneeded: names on one side only of buffers that the family's model does without; they do not count.
        reshaped: name -> (shape in A, shape in B).
        retyped: name -> (dtype in A, dtype in B), values compared all the same.
        differences: of the tensors in both, worst first.
        config: key -> (value in A, value in B) where config.json differs.
        files: small files that are on one side only, or differ.
        is_dequantized: a quantized side was compared by the floats it stands for.
    """

    architectures: tuple[str, ...]
    removed: tuple[str, ...]
    added: tuple[str, ...]
    unneeded: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    retyped: Mapping[str, tuple[str, str]]
    differences: tuple[Difference, ...]
    config: Mapping[str, tuple[Any, Any]]
    files: tuple[str, ...]
    is_dequantized: bool

    def beyond(self, tol: float) -> list[Difference]:
        """The tensors whose largest difference is not within `tol` (a NaN never is)."""
        return [d for d in self.differences if not d.max_abs <= tol]

    def is_same(self, tol: float) -> bool:
        """True when names and shapes agree and every value is within `tol`."""
        return not (self.removed or self.added or self.reshaped or self.beyond(tol))


def compare(a: Checkpoint, b: Checkpoint, *, progress: Progress = NO_PROGRESS) -> Comparison:
    """Compare B with A, tensor by tensor, worst first. Needs memory for a few row slices only.

    Quantized checkpoints are compared by the floats that they stand for.
    """
    left, right = dequantized(a), dequantized(b)
    both = left is not a and right is not b
    left, right = _restored_like(right, a, left, both=both), _restored_like(left, b, right, both=both)
    shared = [n for n in left.tensors if n in right.tensors]
    reshaped = {
        n: (left.tensors[n].shape, right.tensors[n].shape)
        for n in shared
        if left.tensors[n].shape != right.tensors[n].shape
    }
    comparable = [n for n in shared if n not in reshaped]
    differences = _differences(comparable, left, right, progress)
    removed, added = ([n for n in x.tensors if n not in y.tensors] for x, y in ((left, right), (right, left)))
    unneeded = {*_unneeded(left, removed), *_unneeded(right, added)}
    return Comparison(
        architectures=_architectures(a, b),
        removed=tuple(n for n in removed if n not in unneeded),
        added=tuple(n for n in added if n not in unneeded),
        unneeded=tuple(n for n in (*removed, *added) if n in unneeded),
        reshaped=reshaped,
        retyped={d.name: (d.dtype_a, d.dtype_b) for d in differences if d.dtype_a != d.dtype_b},
        differences=tuple(sorted(differences, key=lambda d: d.severity, reverse=True)),
        config=_changed_keys(a.config, b.config),
        files=_changed_files(a, b),
        is_dequantized=left is not a or right is not b,
    )


def _restored_like(other: Checkpoint, ckpt: Checkpoint, floats: Checkpoint, *, both: bool) -> Checkpoint:
    """Weights that come from codes in the dtype of what they are compared with, or in float32 where those do, too."""
    if floats is ckpt:
        return floats
    wanted = {
        name: DType.F32 if (both and is_dequantized(against)) or not against.dtype.is_float else against.dtype
        for name, lazy in floats.tensors.items()
        if is_dequantized(lazy) and (against := other.tensors.get(name)) is not None
    }
    views = {dtype: dequantized(ckpt, dtype=dtype) for dtype in set(wanted.values())}
    return floats.derive(
        tensors={name: views[wanted[name]][name] if name in wanted else t for name, t in floats.tensors.items()}
    )


def _unneeded(ckpt: Checkpoint, names: list[str]) -> list[str]:
    """Those that its family ignores; none where the config is not that of a model."""
    with suppress(LlmkitError):
        model = ckpt.model if names else None
        return [] if model is None else [name for name in names if model.table.is_ignored(name)]
    return []


def _architectures(a: Checkpoint, b: Checkpoint) -> tuple[str, ...]:
    stated = [c.config.get("architectures") or c.config.get("model_type") for c in (a, b)]
    names = [", ".join(map(str, s)) if isinstance(s, list) else str(s) for s in stated]
    return tuple(names) if all(stated) and names[0] != names[1] else ()


def _changed_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = dict.fromkeys([*a, *b])
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k)}


def _changed_files(a: Checkpoint, b: Checkpoint) -> tuple[str, ...]:
    names = sorted({**a.files, **b.files})
    both = [n for n in names if n in a.files and n in b.files]
    changed = [n for n in both if a.files[n].read() != b.files[n].read()]
    return tuple(n for n in names if n not in both or n in changed)


def _differences(names: list[str], a: Checkpoint, b: Checkpoint, progress: Progress) -> list[Difference]:
    n_workers = default_workers()
    # One thread a tensor: threads within such small operations cost more than they give.
    threads = torch.get_num_threads()
    progress.begin(sum(a.tensors[n].spec.nbytes for n in names), "comparing", "B")
    try:
        with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda n: _difference(n, a.tensors[n], b.tensors[n], progress), names))
    finally:
        progress.end()
        torch.set_num_threads(threads)


class _Sums:
    """Running sums over row slices of two tensors."""

    def __init__(self) -> None:
        self.aa = self.bb = self.ab = self.dd = self.largest = 0.0
        self.n_changed = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in one slice of both: [n], of any dtypes."""
        a, b = _wide(x), _wide(y)
        unequal = a != b
        n_changed = int(torch.count_nonzero(unequal))
        d = b - a
        if n_changed and not math.isfinite(float(d.sum())):
            # Equal infinities are no difference, nor is a NaN on both sides; on one side it makes the difference NaN.
            both = torch.isnan(a) & torch.isnan(b)
            n_changed -= int(torch.count_nonzero(both))
            a, b = a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)
            d = torch.where(a == b, torch.zeros_like(a), b - a)
        elif not n_changed:
            d.zero_()
        step = float(torch.linalg.vector_norm(d, ord=math.inf)) if d.numel() else 0.0
        self.largest = step if math.isnan(step) or step > self.largest else self.largest
        self.n_changed += n_changed
        self.aa += float(torch.dot(a, a))
        self.bb += float(torch.dot(b, b))
        self.ab += float(torch.dot(a, b))
        self.dd += float(torch.dot(d, d))


def _difference(name: str, a: Lazy, b: Lazy, progress: Progress) -> Difference:
    sums = _Sums()
    with torch.inference_mode():
        for rows in common_slices(a, b, _SLICE_NBYTES):
            x, y = load_rows(a, rows), load_rows(b, rows)
            for start in range(0, x.numel(), _BLOCK_NUMEL):
                block = slice(start, start + _BLOCK_NUMEL)
                sums.add(x.reshape(-1)[block], y.reshape(-1)[block])
            progress.advance(x.numel() * a.dtype.itemsize, name)
    return Difference(
        name=name,
        dtype_a=a.dtype.name,
        dtype_b=b.dtype.name,
        shape=a.shape,
        max_abs=sums.largest,
        relative_l2=_ratio(sums.dd, sums.aa),
        cosine=sums.ab / math.sqrt(sums.aa * sums.bb) if sums.aa > 0 and sums.bb > 0 else None,
        n_changed=sums.n_changed,
    )


def _ratio(squares: float, reference: float) -> float:
    if reference == 0:
        return math.nan if math.isnan(squares) else math.inf if squares else 0.0
    return math.sqrt(squares / reference)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x).reshape(-1).double() if x.is_complex() else x.double()
