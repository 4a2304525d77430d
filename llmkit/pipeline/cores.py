"""How many cores this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_THREADS = "OMP_NUM_THREADS"  # torch, MKL and others heed it when they are loaded
_MOST = "OMP_THREAD_LIMIT"  # torch does not: it takes more, OpenMP does not start them, oneDNN misses what they compute


def n_cores() -> int:
    """Those that this process is bound to, and no more than its control group gives it time of."""
    usable = getattr(os, "sched_getaffinity", None)  # macOS has none
    n = len(usable(0)) if usable is not None else os.cpu_count() or 1
    return min(n, quota() or n)


def n_threads() -> int:
    """Of a step that dominates the run: what OMP_NUM_THREADS says, else one a core; as OMP_THREAD_LIMIT allows."""
    wanted = _stated(_THREADS) or n_cores()
    return min(wanted, _stated(_MOST) or wanted)


def limit_threads() -> None:
    """Libraries start a thread for each core of the machine unless told: fewer where a control group gives less.

    Threads beyond the quota wait for each other: a product then takes many times as long. To be called before they are
    imported.
    """
    if (quota() is not None or _stated(_MOST)) and _THREADS not in os.environ:
        os.environ[_THREADS] = str(n_threads())


def _stated(name: str) -> int | None:
    """The number in a variable of OpenMP's; None where there is none that counts."""
    first = os.environ.get(name, "").split(",")[0].strip()  # the others are of nested threads
    return int(first) if first.isdecimal() and int(first) > 0 else None


def quota(root: Path = Path("/")) -> int | None:
    """Cores that control groups give this process time of, rounded up; None where they do not limit it.

    Args:
        root: of the file system: proc/self/cgroup and sys/fs/cgroup are read.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us).
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mounted = root / "sys/fs/cgroup" / (controllers and "cpu")  # version 2 names no controllers
            for folder in [mounted / path.lstrip("/"), *(mounted / path.lstrip("/")).parents]:
                if folder.is_relative_to(mounted):
                    found += _cores_of(folder)
    return min(found, default=None)


def _cores_of(folder: Path) -> list[int]:
    """Of one control group of either version: its quota by its period."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            texts = [word for name in names for word in (folder / name).read_text().split()]
            time, period = map(int, texts)  # of version 2 `max` where there is none, of version 1 -1
            return [math.ceil(time / period)] if time > 0 and period > 0 else []
    return []
