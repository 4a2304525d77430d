"""The sizes of one model, and the config keys they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True)
class Sizes:
    """The dims of one model as whole numbers.

    Attributes:
        ffn: width of the MLP.
        context: the longest trained sequence in tokens; None when the config does not say.
        extra: sizes of the family's own, by name.
        keys: name of the dim -> the config key it was read from (or derived from).
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int | None = None
    extra: Mapping[str, int] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    def evaluate(self, formula: str) -> int:
        """The value of a product of dims and numbers (`heads*head_dim`, `3*hidden`)."""
        return prod(self._value(part) for part in formula.split("*"))

    def _value(self, name: str) -> int:
        if name.isdigit():
            return int(name)
        return self.extra[name] if name in self.extra else int(getattr(self, name) or 0)

    def spell(self, formula: str) -> str:
        """The formula in the words of config.json (`num_attention_heads * head_dim`)."""
        return " * ".join(self.keys.get(part, part) for part in formula.split("*"))
