"""Which part of an evaluation one of several processes does, decided by each for itself: there is no coordinator.

Whole subjects go to one shard, so that what their prompts begin with is computed once; the heaviest first, each to the
shard that has least. What a question costs is taken as the bytes of its text, which every machine counts alike and
which tokens follow.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llmkit.errors import InputError

K = TypeVar("K", bound=Hashable)

# Who starts several processes of one command -> the variables of rank and size, and what the rank of the first one is.
_RANKS = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "PMI": ("PMI_RANK", "PMI_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS"),
}
_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts; the first has index 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def path_beside(self, output: Path) -> Path:
        """The file of this part: `run.shard-2-of-3.json` for `run.json`."""
        return output.with_name(f"{output.stem}.shard-{self.index}-of-{self.count}{output.suffix}")


def read_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """A shard from `2/3`, or from the environment for `auto`.

    Under `auto`: a Slurm array counts its tasks, torchrun, accelerate, MPI and srun their processes; processes inside a
    task of an array are parts of its part.

    Raises:
        InputError: the text is no part of a whole, or the environment says nothing of several processes.
    """
    if text != "auto":
        index, slash, count = text.partition("/")
        if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return Shard(int(index), int(count))
        raise InputError(f"--shard {text!r} is no part of a whole", hint="--shard 1/3, 2/3 and 3/3, or --shard auto")
    shard = None
    if (array := _numbers(_ARRAY, environment)) is not None:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN") or 0)
        step = int(environment.get("SLURM_ARRAY_TASK_STEP") or 1)
        shard = Shard((array[0] - first) // step + 1, array[1])
    for rank, size in filter(None, (_numbers(names, environment) for names in _RANKS.values())):
        whole = shard or Shard(1, 1)
        if size > 1 or shard is None:
            shard = Shard((whole.index - 1) * size + rank + 1, whole.count * size)
        break
    if shard is None or not 1 <= shard.index <= shard.count:
        variables = ", ".join(" and ".join(names) for names in (_ARRAY, *_RANKS.values()))
        raise InputError(
            "--shard auto: the environment does not say which of how many processes this is "
            f"(none of {variables} is set)",
            hint="name it: --shard 1/3",
        )
    return shard


def started_by(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Who started this command several times at once, and how many times; None for a process of its own.

    srun is left out: a plain command in a batch script finds its variables as well.
    """
    for name, variables in _RANKS.items():
        numbers = _numbers(variables, environment)
        if name != "srun" and numbers is not None and numbers[1] > 1:
            return name, numbers[1]
    return None


def _numbers(names: tuple[str, str], environment: Mapping[str, str]) -> tuple[int, int] | None:
    values = [environment.get(name, "") for name in names]
    return (int(values[0]), int(values[1])) if all(v.isdecimal() for v in values) else None


def cut_units(costs: Mapping[K, int], count: int) -> list[list[K]]:
    """Units that stay whole, over `count` parts of like cost; each part in the order of `costs`."""
    parts: list[list[K]] = [[] for _ in range(count)]
    held = [0] * count
    order = {unit: i for i, unit in enumerate(costs)}
    for unit in sorted(costs, key=lambda u: (-costs[u], order[u])):
        least = min(range(count), key=lambda i: (held[i], i))
        parts[least].append(unit)
        held[least] += costs[unit]
    return [sorted(part, key=order.__getitem__) for part in parts]


def cut_questions(costs: Sequence[int], part: Shard) -> range:
    """The questions of one part, consecutive ones, which share the longest prefixes."""
    total, before, held = sum(costs) or 1, 0, []
    for i, cost in enumerate(costs):  # to the part in which its middle lies
        if int((before + cost / 2) * part.count / total) == part.index - 1:
            held.append(i)
        before += cost
    return range(held[0], held[-1] + 1) if held else range(0)
