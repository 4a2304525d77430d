"""Do the tensors of a checkpoint fit the config? Decided from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmkit.architecture.names import NameTable
from llmkit.architecture.slots import Slot
from llmkit.errors import SpecError, counted, listing, nearest
from llmkit.tensors.spec import TensorSpec


@dataclass(frozen=True)
class Report:
    """What a comparison of tensors with a model found.

    Attributes:
        problems: contradictions, in words; a checkpoint with one cannot be run.
        notes: what is odd and harmless.
        missing: names of required tensors that are absent.
        extra: names of tensors that the model does not have.
        misshapen: names of tensors with another shape than the config gives.
        ignored: names of stored buffers that nothing needs.
        lacks_head: the head is missing, and nothing else is wrong.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    lacks_head: bool = False

    @property
    def is_ok(self) -> bool:
        """True when there is no problem."""
        return not self.problems

    def raise_if_bad(self, label: str) -> None:
        """Turn problems into an error that names `label`.

        Raises:
            SpecError: there is a problem.
        """
        if self.problems:
            hint = "put the config.json there that these weights were saved with (`llmkit inspect MODEL --tensors`)"
            if self.lacks_head:
                hint = (
                    "a model of embeddings has none; where the embedding is the head, set tie_word_embeddings to true"
                )
            raise SpecError(f"{label}: the tensors do not fit config.json: " + "; ".join(self.problems), hint=hint)


def compare(
    expected: Mapping[str, Slot], specs: Mapping[str, TensorSpec], table: NameTable, *, is_tied: bool
) -> Report:
    """Compare specs with the expected slots (both by tensor name)."""
    missing, extra, misshapen = mismatches(expected, specs, table)
    ignored = tuple(name for name in _beyond(specs, expected) if table.is_ignored(name))
    problems = _missing(missing, extra, expected)
    if extra:
        problems.append(f"{counted(len(extra), 'tensor')} that the model does not have: {listing(extra)}")
    problems += _misshapen(misshapen, specs, expected)
    notes: list[str] = []
    heads = [slot.name for slot in expected.values() if slot.kind == "head"]
    if is_tied and any(name in specs for name in heads):
        notes.append(f"{listing(heads)} is stored, too: a copy of the embedding, to which the config ties it")
    if ignored:
        notes.append(f"{len(ignored)} buffers that nothing needs are ignored ({listing(ignored, 1)})")
    lacks_head = len(problems) == 1 and {expected[name].kind for name in missing} == {"head"}
    return Report(tuple(problems), tuple(notes), missing, extra, misshapen, ignored, lacks_head)


def mismatches(
    expected: Mapping[str, Slot], specs: Mapping[str, TensorSpec], table: NameTable
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of tensors that are missing, extra, and misshapen (see `Report`)."""
    return (
        tuple(name for name in _beyond(expected, specs) if not expected[name].is_optional),
        tuple(name for name in _beyond(specs, expected) if not table.is_ignored(name)),
        tuple(name for name, slot in expected.items() if name in specs and specs[name].shape != slot.shape),
    )


def _beyond(names: Mapping[str, object], others: Mapping[str, object]) -> list[str]:
    """Those names, in order, that others do not have: of a hundred thousand often none."""
    beyond = names.keys() - others.keys()
    return [name for name in names if name in beyond] if beyond else []


def _missing(missing: Sequence[str], extra: Sequence[str], expected: Mapping[str, Slot]) -> list[str]:
    problems = []
    heads = [name for name in missing if expected[name].kind == "head"]
    rest = [name for name in missing if expected[name].kind != "head"]
    if heads:
        problems.append(
            f"{listing(heads)} is missing, and the config does not tie the head to the embedding "
            "(tie_word_embeddings is false or absent)"
        )
    if rest:
        guess = nearest(rest[0], extra)
        tail = f" (there is {guess}, which the model does not have)" if guess else ""
        problems.append(f"{counted(len(rest), 'tensor')} missing: {listing(rest)}{tail}")
    return problems


def _misshapen(names: Sequence[str], specs: Mapping[str, TensorSpec], expected: Mapping[str, Slot]) -> list[str]:
    """One sentence for each slot, the layers gathered."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in names:
        stem = re.sub(r"^layers\.\d+\.", "layers.*.", expected[name].id)
        groups.setdefault((stem, specs[name].shape), []).append(name)
    problems = []
    for (_, shape), members in groups.items():
        slot = expected[members[0]]
        more = f" (and {len(members) - 1} more layers)" if len(members) > 1 else ""
        problems.append(
            f"{members[0]}{more} has shape {list(shape)}, expected {list(slot.shape)} = [{slot.formula}] by config.json"
        )
    return problems
