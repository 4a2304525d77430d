"""From what a user wrote to an adapter."""

from __future__ import annotations

from pathlib import Path

from llmkit.checkpoint.hub import resolve_path
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_opening import read_adapter

__all__ = ["open_adapter"]


def open_adapter(adapter: str | Path, *, alpha: float | None = None, force: bool = False) -> Adapter:
    """Open an adapter: a folder, a file, or a hub id. Reads headers and config only.

    Args:
        alpha: the scaling numerator of a file that has no config.
        force: take on trust that the base is the changed one that an adapter needs.

    Raises:
        InputError: no adapter there, an empty one, or malformed files.
        RequirementError: an adapter that no merged weights can express, named.
    """
    return read_adapter(resolve_path(adapter), alpha=alpha, force=force)
