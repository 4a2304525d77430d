"""Layers of several sorts: with attention to all before them, with a sliding window, or without attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmkit.architecture.keys import Key, lookup
from llmkit.errors import SpecError

_SORTS, _MLPS = ("full_attention", "sliding_attention"), ("dense", "sparse")


def layer_type(config: Mapping[str, Any], i: int, sorts: Sequence[str], rule: Callable[[int], str]) -> str:
    """The sort of layer `i`: as `layer_types` says (transformers 5), or by the family's rule without it.

    Raises:
        SpecError: `layer_types` has too few entries, or one that is none of the sorts.
    """
    types = config.get("layer_types")
    if types is None:
        return rule(i)
    if not isinstance(types, list) or len(types) <= i or types[i] not in sorts:
        found = types[i] if isinstance(types, list) and len(types) > i else types
        raise SpecError(f"config.json: layer_types[{i}] must be one of {', '.join(sorts)}, found {found!r}")
    return str(types[i])


def listed_type(config: Mapping[str, Any], i: int, lists: Mapping[str, str]) -> str | None:
    """The sort of layer `i` by lists of layers, which count from 1; None where config.json lacks one of them.

    Args:
        lists: key of config.json (`linear_attn_config.kda_layers`) -> the sort of the layers in it.

    Raises:
        SpecError: none has it, or several do.
    """
    listed = {sort: lookup(Key(key, None), config) for key, sort in lists.items()}
    if any(layers is None for layers in listed.values()):
        return None
    sorts = [sort for sort, layers in listed.items() if isinstance(layers, list) and i + 1 in layers]
    if len(sorts) != 1:
        raise SpecError(f"config.json: layer {i + 1} must be in one of {' and '.join(lists)}")
    return sorts[0]


def is_sliding(config: Mapping[str, Any], i: int, rule: Callable[[int], bool]) -> bool:
    """Whether layer `i` has a window: as `layer_types` says, or by the family's rule without it.

    Raises:
        SpecError: `layer_types` has too few entries, or one that is neither sort.
    """
    return layer_type(config, i, _SORTS, lambda i: _SORTS[rule(i)]) == _SORTS[1]


def window_of(config: Mapping[str, Any], default: int | None) -> int | None:
    """The width of `sliding_window` in tokens, the query's own included; null is no window, absent the default.

    Raises:
        SpecError: it is not a positive whole number.
    """
    width = config.get("sliding_window", default)
    if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
        raise SpecError(f"config.json: sliding_window is {width!r}, expected a positive whole number or null")
    return width


def is_dense(config: Mapping[str, Any], i: int, n_dense: int) -> bool:
    """Whether layer `i` has no experts: as `mlp_layer_types` says, or one of the first `first_k_dense_replace`.

    Args:
        n_dense: how many these are, where config.json does not say.

    Raises:
        SpecError: `mlp_layer_types` has too few entries, or one that is neither sort.
    """
    types = config.get("mlp_layer_types")
    if types is None:
        stated = config.get("first_k_dense_replace")
        return i < (n_dense if stated is None else int(stated))
    if not isinstance(types, list) or len(types) <= i or types[i] not in _MLPS:
        raise SpecError(f"config.json: mlp_layer_types must have one of {', '.join(_MLPS)} for layer {i}")
    return bool(types[i] == _MLPS[0])
