"""A recipe: how single matrices are stored, by globs of their names. Of several globs that match, the first counts.

The file is YAML (so it may be JSON):

    "*.down_proj": {bits: 8, group_size: 128}
    "*.layers.0.*": 8
    lm_head: float
    "blk.*.attn_v": q6_k          # a type of blocks, for GGUF; or nf4, fp4, fp8, where the format has them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import InputError, listing
from llmkit.formats.text_file import read_yaml
from llmkit.transforms.layers import GroupSize, matcher

_FORMS = "a number of bits, {bits, group_size, symmetric}, float, or a type (nf4, fp8, GGUF's q6_k)"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is stored. What is None is as for all matrices that no glob names.

    Attributes:
        bits: of each weight; None: it stays in floats, or `type` says it.
        group_size, symmetric: as of `llmkit.transforms.quantize.quantize`.
        type: what codes stand for (`llmkit.quantization.points`), or of GGUF's blocks (`Q4_K`); empty for integers.
    """

    bits: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    type: str = ""

    @property
    def is_float(self) -> bool:
        """Whether the matrix stays as it is."""
        return self.bits is None and not self.type

    def attrs(self) -> Any:
        """Plain data, as a recipe file has it."""
        if self.bits is None:
            return self.type or "float"
        settings = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {key: value for key, value in settings.items() if value is not None}


FLOAT = Scheme()
Recipe = Mapping[str, Scheme]
"""Globs of modules or tensors, in the order in which they are tried."""


def recipe_attrs(recipe: Recipe) -> dict[str, Any]:
    """Plain data for the history: what a recipe file would hold."""
    return {glob: scheme.attrs() for glob, scheme in recipe.items()}


def first_matches(names: Iterable[str], recipe: Recipe) -> dict[str, str]:
    """The glob that counts for each tensor that one matches."""
    if not recipe:
        return {}
    first_match = matcher(tuple(recipe))
    pairs = ((name, first_match(name)) for name in names)
    return {name: glob for name, glob in pairs if glob is not None}


def read_recipe(path: Path) -> dict[str, Scheme]:
    """The recipe in a file.

    Raises:
        InputError: no such file, no YAML, or something else than globs and schemes.
    """
    document = read_yaml(path, once=True)
    if not isinstance(document, dict) or not document:
        raise InputError(f"{path} is no recipe: expected globs of modules, each with {_FORMS}", hint="'*.v_proj': 8")
    return {str(glob): _scheme(value, f"{path}: {glob}") for glob, value in document.items()}


def _scheme(value: object, where: str) -> Scheme:
    if isinstance(value, bool):
        raise _wrong(value, where)
    if isinstance(value, int):
        return Scheme(value)
    if isinstance(value, str):
        return FLOAT if value == "float" else Scheme(type=value.upper())
    if not isinstance(value, dict):
        raise _wrong(value, where)
    unknown = [str(key) for key in value if key not in ("bits", "group_size", "symmetric")]
    if unknown:
        raise InputError(f"{where} has {listing(unknown)}; expected bits, group_size, symmetric", hint="{bits: 8}")
    bits, size, symmetric = value.get("bits"), value.get("group_size"), value.get("symmetric")
    is_size = size is None or type(size) is int or size in ("auto", "channel")
    if type(bits) is not int or not is_size or not isinstance(symmetric, bool | None):
        raise _wrong(value, where)
    return Scheme(bits, size, symmetric)


def _wrong(value: object, where: str) -> InputError:
    return InputError(f"{where} is {str(value)[:60]}; expected {_FORMS}", hint="{bits: 8, group_size: 64}")
