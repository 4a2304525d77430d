"""An architecture as data, and its binding to one config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.architecture.keys import Key, as_key, lookup, source_of
from llmkit.architecture.kinds import Block, Head
from llmkit.architecture.model import Model
from llmkit.architecture.names import Names
from llmkit.architecture.prompts import Prompt
from llmkit.architecture.sizes import Sizes
from llmkit.errors import SpecError

__all__ = ["Architecture", "Dims"]

_KV_HEADS = Key("num_key_value_heads", None)
_HEAD_DIM = Key("head_dim", None)
_CONTEXT = Key("max_position_embeddings", None)


@dataclass(frozen=True)
class Dims:
    """Which config keys hold the sizes. A string is a required key, a `Key` has spellings and a default.

    Attributes:
        kv_heads: absent in a config means as many as heads.
        head_dim: absent in a config means hidden / heads.
        context: the longest sequence it was trained for, in tokens; absent means unknown.
    """

    hidden: str | Key
    layers: str | Key
    heads: str | Key
    ffn: str | Key
    vocab: str | Key
    kv_heads: Key = _KV_HEADS
    head_dim: Key = _HEAD_DIM
    context: Key = _CONTEXT

    def bind(self, config: Mapping[str, Any]) -> Sizes:
        """The sizes as whole numbers.

        Raises:
            SpecError: a key is absent, not a positive whole number, or heads do not divide.
        """
        found: dict[str, int | None] = {}
        keys: dict[str, str] = {}
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context"):
            key: Key = as_key(getattr(self, name))
            found[name] = _whole(name, key, config)
            keys[name] = source_of(key, config) or key.spellings[0]
        context = found.pop("context")
        hidden, heads = found["hidden"] or 0, found["heads"] or 0
        if found["kv_heads"] is None:
            found["kv_heads"], keys["kv_heads"] = heads, keys["heads"]
        if found["head_dim"] is None:
            if hidden % heads:
                raise SpecError(
                    f"config.json: {keys['hidden']} {hidden} is not a multiple of {keys['heads']} {heads}",
                    hint=f"a model with another head size states it as {keys['head_dim']!r}",
                )
            found["head_dim"], keys["head_dim"] = hidden // heads, f"{keys['hidden']}/{keys['heads']}"
        sizes = {name: value or 0 for name, value in found.items()}
        if heads % sizes["kv_heads"]:
            raise SpecError(
                f"config.json: {keys['heads']} {heads} is not a multiple of {keys['kv_heads']} {sizes['kv_heads']}"
            )
        return Sizes(**sizes, context=context, keys=keys)


def _whole(name: str, key: Key, config: Mapping[str, Any]) -> int | None:
    value = lookup(key, config)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        where = source_of(key, config) or key.spellings[0]
        raise SpecError(f"config.json: {where} is {value!r}, expected a positive whole number ({name})")
    return int(value)


@dataclass(frozen=True)
class Architecture:
    """One decoder family as data.

    Attributes:
        name: a short name, as `plugins list` shows it.
        matches: the values of `architectures` in config.json that it claims; upper and lower case do not matter.
        model_types: the values of `model_type` that it claims where `architectures` is missing.
        tiny: the config of a tiny random model, with `architectures` and `model_type`.
        variants: name -> changes to `tiny`, one for each thing that a config of the family can vary.
        prompt: the format that the family's base checkpoints expect.
    """

    name: str
    matches: tuple[str, ...]
    dims: Dims
    block: Block
    head: Head
    names: Names
    tiny: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    prompt: Prompt | None = None

    def bind(self, config: Mapping[str, Any]) -> Model:
        """This architecture with the sizes and values of one config.

        Raises:
            SpecError: the config lacks a key or contradicts itself.
        """
        return Model(
            family=self.name,
            dims=self.dims.bind(config),
            block=self.block.bind(config),
            head=self.head.bind(config),
            names=self.names,
        )

    def tiny_config(self, variant: str | None = None) -> dict[str, Any]:
        """The config of the tiny model, or of one of its variants."""
        changes = self.variants[variant] if variant is not None else {}
        return {**self.tiny, **changes}
