"""Bits for each matrix, by measured sensitivity, so that the whole model has a given size. The result is a recipe.

The size is that of all tensors, what stays in floats included. Layouts whose loaders compute q, k and v, or gate and
up, as one product give the matrices of a product the same scheme, and all experts one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.architecture.slots import is_of_expert
from llmkit.calibration.samples import Samples
from llmkit.calibration.sensitivity import Trial, errors_of_weights, errors_on_text
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.statistics import StoredStatistics
from llmkit.errors import InputError
from llmkit.quantization.allocation import Size, allocate, least_nbytes
from llmkit.tensors.device import CPU
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import format_bytes
from llmkit.transforms.candidates import Candidate, Candidates
from llmkit.transforms.recipe import Scheme

_EMBEDDING = "embed.weight"
_OTHER_FORMAT = ", or a format that holds the embedding, too: --format gguf"


@dataclass(frozen=True, slots=True)
class Target:
    """How large the model shall be: one of the two.

    Attributes:
        bits: of all tensors, for each parameter of the model.
        nbytes: of the files with the weights.
    """

    bits: float | None = None
    nbytes: int | None = None

    def __str__(self) -> str:
        return f"{self.bits:g} bits per weight" if self.bits is not None else format_bytes(self.nbytes or 0)


@dataclass(frozen=True, slots=True)
class RoleBits:
    """What was chosen for the matrices of one role with the same scheme.

    Attributes:
        role: the name, without the numbers of layers.
        layers: as ranges, such as `0-3, 7`; empty outside the layers.
        error: their mean measured error as stored now.
        next_error: with the next smaller size; None where there is none.
    """

    role: str
    layers: str
    scheme: str
    nbytes: int
    error: float
    next_error: float | None


@dataclass(frozen=True)
class BitAllocation:
    """A recipe that meets the target, and why it is so."""

    recipe: dict[str, Scheme]
    choices: Sequence[RoleBits]
    nbytes: int
    bits_per_weight: float
    measured: str
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def words(self) -> str:
        """For the plan."""
        return f"bits per matrix chosen for {self.bits_per_weight:.2f} bits per weight in all, by {self.measured}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json` and the manifest."""
        choices = [{slot: getattr(c, slot) for slot in RoleBits.__slots__} for c in self.choices]
        return {
            "nbytes": self.nbytes, "bits_per_weight": self.bits_per_weight, "measured": self.measured,
            "choices": choices, "errors": {name: dict(by_scheme) for name, by_scheme in self.errors.items()},
        }  # fmt: skip


def choose_bits(
    ckpt: Checkpoint,
    target: Target,
    candidates: Candidates,
    known: Samples | StoredStatistics | None,
    report: Callable[[str], None] = lambda text: None,
    *,
    device: str = CPU,
) -> BitAllocation:
    """The scheme of each matrix, for the least sum of errors within the target. Reads the weights.

    Args:
        known: a text, or what was measured of the inputs; None for the errors of the weights alone.
        report: told what is at work.
        device: where blocks compute.

    Raises:
        InputError: the target is below what the smallest sizes take, or not below the model as it is.
    """
    n_parameters = sum(lazy.spec.numel for lazy in ckpt.tensors.values())
    units = _units(candidates)
    options = {unit: _united([candidates.matrices[name] for name in names]) for unit, names in units.items()}
    fixed = candidates.fixed_nbytes + (candidates.header_nbytes if target.nbytes is not None else 0)
    budget = (target.nbytes if target.nbytes is not None else int((target.bits or 0) * n_parameters / 8)) - fixed
    has_embedding = any(_EMBEDDING in weights for weights in candidates.weights.values())
    _refuse_out_of_reach(ckpt, target, options, budget, fixed, n_parameters, has_embedding=has_embedding)
    measured, errors = _errors(ckpt, candidates, units, options, known, report, device)
    sizes = [[Size(c.nbytes, e) for c, e in zip(options[u], errors[u], strict=True)] for u in units]
    picked = dict(zip(units, allocate(sizes, budget), strict=True))
    recipe = {name: options[unit][picked[unit]].scheme for unit, names in units.items() for name in names}
    nbytes = candidates.fixed_nbytes + sum(options[u][i].nbytes for u, i in picked.items())
    by_name = {
        unit: {str(c.scheme.attrs()): e for c, e in zip(options[unit], errors[unit], strict=True)} for unit in units
    }
    choices = _folded(units, options, errors, picked)
    return BitAllocation(recipe, choices, nbytes, 8 * nbytes / n_parameters, measured, by_name)


def _units(candidates: Candidates) -> dict[str, list[str]]:
    """The matrices that get one scheme, by the name of the first."""
    units: dict[str, list[str]] = defaultdict(list)
    for name in candidates.matrices:
        units[_product(candidates.weights[name]) if candidates.shares_products else name].append(name)
    return {names[0]: names for names in units.values()}


def _product(weights: Mapping[str, Lazy]) -> str:
    """The fused product that a matrix is part of: `layers.3.attn.qkv`."""
    first = next(iter(weights))
    if is_of_expert(first):
        return "experts"  # transformers and vLLM compute all experts from one scheme
    stem, _, leaf = first.removesuffix(".weight").rpartition(".")
    together = next((product for product in (("q", "k", "v"), ("gate", "up")) if leaf in product), (leaf,))
    return f"{stem}.{''.join(together)}"


def _united(matrices: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """The candidates that all of some matrices have, with the bytes of all."""
    shared = []
    for candidate in matrices[0]:
        same = [option for matrix in matrices for option in matrix if option.scheme == candidate.scheme]
        if len(same) == len(matrices):
            shared.append(Candidate(candidate.scheme, sum(option.nbytes for option in same), candidate.restore))
    return shared


def _refuse_out_of_reach(
    ckpt: Checkpoint,
    target: Target,
    options: Mapping[str, Sequence[Candidate]],
    budget: int,
    fixed: int,
    n_parameters: int,
    *,
    has_embedding: bool,
) -> None:
    least = least_nbytes([[Size(c.nbytes, 0) for c in candidates] for candidates in options.values()]) if options else 0
    if budget < least:
        bits = 8 * (least + fixed) / n_parameters
        raise InputError(
            f"{ckpt.label} does not get as small as {target}: with the fewest bits everywhere it has "
            f"{format_bytes(least + fixed)}, {bits:.2f} bits per weight ({format_bytes(fixed)} stay in floats)",
            hint=f"--target-bits {bits + 0.05:.1f}{_OTHER_FORMAT * (not has_embedding)}",
        )
    if budget >= sum(max(c.nbytes for c in candidates) for candidates in options.values()):
        raise InputError(
            f"{ckpt.label} is not larger than {target} as it is",
            hint="a smaller --target-bits or --target-size, or --bits 8",
        )


def _errors(
    ckpt: Checkpoint,
    candidates: Candidates,
    units: Mapping[str, Sequence[str]],
    options: Mapping[str, Sequence[Candidate]],
    known: Samples | StoredStatistics | None,
    report: Callable[[str], None],
    device: str,
) -> tuple[str, dict[str, list[float]]]:
    """By what is measured, and the error of each candidate of each unit."""
    trials, layers = dict[str, Trial](), dict[str, list[str]]()
    for unit, names in units.items():
        restores = [c.restore for c in options[unit] if c.restore is not None]
        by_layer: dict[int | None, dict[str, Lazy]] = defaultdict(dict)
        for name in names:
            for weight, lazy in candidates.weights[name].items():
                by_layer[_layer(weight)][weight] = lazy
        layers[unit] = [f"{unit} {layer}" for layer in by_layer]
        trials |= {f"{unit} {layer}": Trial(weights, layer, restores) for layer, weights in by_layer.items()}
    if isinstance(known, Samples):
        measured = errors_on_text(ckpt, known, trials, report, device=device)
        words = f"the error of block outputs on {known.label}"
    else:
        report("measuring the error of every matrix")
        measured = errors_of_weights(trials, known)
        words = "the error of the weights" if known is None else f"the error of outputs by {known.label}"
    unit_errors = {}
    for unit, of_unit in options.items():
        lossy = iter([sum(of_parts) for of_parts in zip(*(measured[part] for part in layers[unit]), strict=True)])
        unit_errors[unit] = [0.0 if c.restore is None else next(lossy) for c in of_unit]
    return words, unit_errors


def _layer(weight: str) -> int | None:
    match = re.match(r"layers\.(\d+)\.", weight)
    return int(match[1]) if match is not None else None


def _folded(
    units: Mapping[str, Sequence[str]],
    options: Mapping[str, Sequence[Candidate]],
    errors: Mapping[str, Sequence[float]],
    picked: Mapping[str, int],
) -> list[RoleBits]:
    """One row for all matrices of a role that have the same scheme."""
    rows: dict[tuple[str, str], list[tuple[set[int], int, float, float | None]]] = defaultdict(list)
    for unit, names in units.items():
        candidates, i = options[unit], picked[unit]
        smaller = [
            (c.nbytes, e) for c, e in zip(candidates, errors[unit], strict=True) if c.nbytes < candidates[i].nbytes
        ]
        layers = {int(numbers[0]) for name in names if (numbers := re.findall(r"\.(\d+)\.", name))}
        stems = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) for name in names))
        role = ", ".join([stems[0], *(stem.rpartition(".")[2] for stem in stems[1:])])
        entry = (
            layers,
            candidates[i].nbytes,
            errors[unit][i],
            max(smaller)[1] if smaller else None,
        )
        rows[role, _short(candidates[i].scheme)].append(entry)
    order = {role: i for i, (role, _) in enumerate(reversed(list(rows)))}
    return [
        RoleBits(
            role,
            _ranges(set[int]().union(*(layers for layers, *_ in entries))),
            scheme,
            sum(nbytes for _, nbytes, *_ in entries),
            _mean([error for *_, error, _ in entries]),
            _mean(nexts) if (nexts := [after for *_, after in entries if after is not None]) else None,
        )
        for (role, scheme), entries in sorted(rows.items(), key=lambda row: (-order[row[0][0]], row[0][1]))
    ]


def _short(scheme: Scheme) -> str:
    return scheme.type or ("float" if scheme.is_float else f"{scheme.bits} bits")


def _mean(numbers: Sequence[float]) -> float:
    return float(f"{sum(numbers) / len(numbers):.3g}")


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7`."""
    ranges: list[list[int]] = []
    for n in sorted(numbers):
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
