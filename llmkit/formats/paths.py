"""Paths as a user writes them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """A path with the home folder in the place of `~`; as it is where nobody has that name, or no home."""
    return Path(os.path.expanduser(path))
