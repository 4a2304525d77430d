"""The read and write rates of this disk, measured by a short probe, for the estimate of a plan's time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_PROBE_NBYTES = 32 * 2**20


def measured_rates(inputs: Sequence[Path], folder: Path) -> tuple[float, float]:
    """Bytes a second of reading the largest input, and of writing to `folder` (to a nameless file, synced).

    A short probe: the page cache may flatter it, a busy disk may belie it.
    """
    written = _timed(lambda: _write_probe(folder))
    largest = max(inputs, key=lambda p: p.stat().st_size, default=None)
    if largest is None:
        return written, written
    return _timed(lambda: _read_probe(largest)), written


def _timed(probe: Callable[[], int]) -> float:
    started = time.perf_counter()
    nbytes = probe()
    return max(nbytes, 1) / max(time.perf_counter() - started, 1e-6)


def _write_probe(folder: Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_PROBE_NBYTES))
        file.flush()
        os.fsync(file.fileno())
    return _PROBE_NBYTES


def _read_probe(path: Path) -> int:
    with path.open("rb") as file:
        # From the middle: the head of the file was read a moment ago, with the header.
        file.seek(max(path.stat().st_size // 2 - _PROBE_NBYTES // 2, 0))
        return len(file.read(_PROBE_NBYTES))
