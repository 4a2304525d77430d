"""What a draft is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkit.drafting.layout import Layout
from llmkit.drafting.sizes import Config

__all__ = ["Draft", "Line"]


@dataclass(frozen=True)
class Line:
    """A Python expression, and what of it is a guess."""

    code: str
    check: str | None = None


@dataclass
class Draft:
    """Everything that the text of a plugin is made of.

    Attributes:
        sizes: what the shapes say, by dim.
        dims: dim -> expression.
        parts: field of the architecture (`norm`, `attention`, …) -> expression.
        slots: slot -> expression of its entry in the name table.
        outer: the same outside the blocks.
        extra: weights that no kind of the core has: leaf of the slot -> (formulas, sort).
        is_plain: the block is one of the core's; otherwise the draft has a kind of its own.
        remarks: what could not be told.
        special: what speaks for mathematics that the draft does not have.
    """

    label: str
    config: Config
    layout: Layout
    sizes: dict[str, int] = field(default_factory=dict)
    dims: dict[str, Line] = field(default_factory=dict)
    parts: dict[str, Line] = field(default_factory=dict)
    embedding: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    slots: dict[str, Line] = field(default_factory=dict)
    outer: dict[str, str] = field(default_factory=dict)
    extra: dict[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    is_plain: bool = True
    remarks: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
