"""Recognising a layout by file names, first bytes and tensor names; no tensor data is read."""

from __future__ import annotations

from llmkit.entry_points import loaded
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.layout import Layout, OpenedLayout

GROUP = "llmkit.layouts"


def open_foreign(candidate: Candidate) -> OpenedLayout | None:
    """What a layout other than transformers' own holds; None where no layout claims the path.

    Raises:
        InputError: a layout is recognised and its files are damaged, incomplete or contradict one another.
    """
    return next((opened for layout in layouts() if (opened := layout.find(candidate)) is not None), None)


def layouts() -> tuple[Layout, ...]:
    """All registered layouts, in the order in which they are asked.

    Raises:
        PluginError: one of llmkit's own cannot be loaded. One of another distribution is left out; `llmkit doctor`
            names it.
    """
    return tuple(sorted(loaded(GROUP, Layout).values(), key=lambda layout: not layout.has_own_format))
