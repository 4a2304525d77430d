"""What a protocol is: how a benchmark's questions are put to a model, and how its answers are read.

A protocol is one module with an entry point in the group `llmkit.protocols`. The entry is named `BENCH.NAME`; one
without a benchmark (`lm-eval`) is for all of them. Most are `Prompting` (`llmkit.evaluation.prompting`): prompts of
their own, whose answers are letters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmkit import entry_points
from llmkit.errors import InputError, suggestion
from llmkit.evaluation.benches import Bench

if TYPE_CHECKING:
    from llmkit.evaluation.csv_forms import Doc
    from llmkit.evaluation.lm import SharedPrefixLM
    from llmkit.evaluation.record import BenchResult

GROUP = "llmkit.protocols"
DEFAULT = "lm-eval"

Average = Literal["micro", "macro"]
Samples = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Documents:
    """A subject's documents.

    Attributes:
        scored: all of the split that is scored, beyond the limit too.
        shots: the examples before each question.
    """

    scored: Sequence[Mapping[str, Any]]
    shots: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Everything of a run that needs no model.

    Attributes:
        documents: by subject.
        score: scores a model on some of the subjects: the result, and by task name what is logged of each question.
    """

    documents: Mapping[str, Documents]
    score: Callable[[SharedPrefixLM, Sequence[str]], tuple[BenchResult, Samples]]


@dataclass(frozen=True)
class Workload:
    """What is to be scored of a benchmark.

    Attributes:
        bench: with the split that is scored.
        docs: by subject, split -> documents in the order of the file; None: they are the hub's.
        shots: how many examples stand before a question.
        limit: only the first questions of each subject; below 1 a share of them.
        chat: prompts are put in a chat format.
    """

    bench: Bench
    docs: Mapping[str, Mapping[str, Sequence[Doc]] | None]
    shots: int
    limit: float | None = None
    chat: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """The benchmark's other subjects."""
        return tuple(s.name for s in self.bench.subjects if s.name not in self.docs)


class Protocol(ABC):
    """One published way to score a benchmark.

    Attributes:
        name: as `--protocol` spells it.
        average: the one that its authors report: over questions (micro) or over subjects (macro).
        shots: how many are usual; None: as many as the benchmark says.
    """

    name: str
    average: Average = "micro"
    shots: int | None = None

    @abstractmethod
    def plan(self, work: Workload) -> Plan:
        """Read the documents, and find the mistakes that can be found without a model.

        Raises:
            InputError: the hub does not give the documents, or the protocol has no place for what is wanted.
        """


def protocol_names(bench: str) -> list[str]:
    """The protocols of a benchmark, the default one first."""
    names = sorted(e.name for e in entry_points.entries(GROUP))
    return [n for n in names if "." not in n] + [
        n.removeprefix(f"{bench}.") for n in names if n.startswith(f"{bench}.")
    ]


def protocol_named(bench: Bench, name: str) -> Protocol:
    """The protocol that `--protocol NAME` means for a benchmark.

    Raises:
        InputError: the benchmark has none of that name.
        PluginError: two distributions register it, or it cannot be loaded.
    """
    names = protocol_names(bench.name)
    if name not in names:
        raise InputError(
            f"{bench.title} has no protocol {name!r}; it has {', '.join(names)}",
            hint=_elsewhere(name) or suggestion(name, names, f"--protocol {names[0]}", "--protocol "),
        )
    own = f"{bench.name}.{name}"
    entry = own if any(e.name == own for e in entry_points.entries(GROUP)) else name
    return entry_points.by_name(GROUP, entry, "--protocol", Protocol)  # type: ignore[type-abstract]


def _elsewhere(name: str) -> str | None:
    """Where a protocol of another benchmark belongs."""
    owners = [e.name.rpartition(".")[0] for e in entry_points.entries(GROUP) if e.name.rpartition(".")[2] == name]
    return f"--protocol {name} is for --bench {' or '.join(sorted(set(owners)))}" if owners else None
