"""The config groups of compressed-tensors: the grids of the weights of modules, and of their inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from llmkit.errors import RequirementError, SpecError
from llmkit.quantization.matrix import Grid
from llmkit.quantization.points import FP8

PACKED, FLOAT, INTEGER = "pack-quantized", "float-quantized", "int-quantized"
_TOKEN_BY_TOKEN = {"strategy": "token", "dynamic": True, "observer": None}


def group_entry(grid: Grid, *, has_order: bool, rounds_inputs: bool) -> dict[str, Any]:
    """A config group, without its targets.

    Args:
        rounds_inputs: inputs are to be integers, too, as those of float8 weights are to be float8.
    """
    is_float = grid.points is not None
    weights: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "float" if is_float else "int",
        "symmetric": grid.is_symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": "group" if has_order else None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "weights": weights,
        # Inputs are rounded like the weights, as they come, each token on its own range.
        "input_activations": {**weights, **_TOKEN_BY_TOKEN} if is_float or rounds_inputs else None,
        "output_activations": None,
        "format": FLOAT if is_float else INTEGER if rounds_inputs else PACKED,
    }


def grid_of(weights: Mapping[str, Any]) -> Grid:
    """The grid of the `weights` entry of a config group.

    Raises:
        RequirementError: floats, dynamic grids, or strategies other than group and channel.
        SpecError: it is malformed.
    """
    if not isinstance(weights, Mapping):
        raise SpecError(f"compressed-tensors weights are {str(weights)[:60]!r}, expected an object")
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    group_size, bits = weights.get("group_size"), weights.get("num_bits")
    if type(bits) is not int or type(group_size) not in (int, type(None)):
        raise SpecError(
            f"compressed-tensors weights of num_bits {str(bits)[:60]!r}, group_size {str(group_size)[:60]!r}"
        )
    if strategy is None:  # as compressed-tensors infers it
        strategy = "group" if group_size and group_size > 0 else "channel" if group_size == -1 else "tensor"
    if kind != "int" or strategy not in ("group", "channel") or weights.get("dynamic"):
        raise RequirementError(
            f"compressed-tensors weights of type {kind!r}, strategy {strategy!r}"
            f"{', dynamic' if weights.get('dynamic') else ''} are not read; expected int, group or channel, static"
        )
    if strategy == "group" and (group_size is None or group_size < 1):
        raise SpecError(f"compressed-tensors weights of strategy 'group' with group_size {group_size!r}")
    return Grid(bits, group_size if strategy == "group" else None, bool(weights.get("symmetric", True)))


def dynamic_inputs(entry: Mapping[str, Any]) -> dict[Grid, Any]:
    """How inputs are rounded as they come, by the grid of the weights; None where they stay floats."""
    found: dict[Grid, Any] = {}
    for group in groups_of(entry):
        weights, inputs = group.get("weights"), group.get("input_activations")
        if isinstance(weights, Mapping) and (not inputs or (isinstance(inputs, Mapping) and inputs.get("dynamic"))):
            is_float8 = (weights.get("type"), weights.get("num_bits")) == ("float", FP8.bits)
            with suppress(RequirementError, SpecError):  # a group that no stored matrix belongs to
                found[Grid(FP8.bits, points=FP8) if is_float8 else grid_of(weights)] = inputs or None
    return found


def groups_of(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config groups, each with its `format`."""
    groups = entry.get("config_groups")
    listed = groups.values() if isinstance(groups, Mapping) else ()
    return [{**g, "format": g.get("format") or entry.get("format")} for g in listed if isinstance(g, Mapping)]


def group_of(module: str, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The config group of a module: exact names win over patterns, patterns over classes (`Linear`)."""
    named = [(group.get("targets"), group) for group in groups]
    targets = [(str(target), group) for listed, group in named if isinstance(listed, list) for target in listed]
    exact = [group for target, group in targets if target == module]
    try:
        patterns = [group for target, group in targets if target.startswith("re:") and re.match(target[3:], module)]
    except re.error as error:
        raise SpecError(f"quantization_config: a target is no regular expression: {error}") from error
    classes = [group for target, group in targets if target.isidentifier()]
    for group in (*exact, *patterns, *classes):
        return group
    raise SpecError("it is quantized, but no config group has it as a target")
