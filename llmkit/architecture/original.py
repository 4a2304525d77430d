"""How a family's own code published its weights, where that is not as transformers stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.names import Names

__all__ = ["Original"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Original:
    """Another spelling of a family's weights, in files that say nothing else about the model.

    Attributes:
        name: as `inspect` shows it.
        names: how the tensors are spelled.
        marks: tensors by which the spelling is recognised: all of them are there.
        config: the config.json of a model with tensors of these shapes.
    """

    name: str
    names: Names
    marks: tuple[str, ...]
    config: Callable[[Shapes], dict[str, Any]]
