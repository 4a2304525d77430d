"""A base with its tuned model."""

from __future__ import annotations

from pathlib import Path

import pytest
from release_world import write_hf


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """Two rows more than the base, and a file that the base has not."""
    folder = write_hf(tmp_path / "tuned", rows=98, tuned=1)
    (folder / "added_tokens.json").write_text('{"<|prompter|>": 96, "<|assistant|>": 97}')
    (folder / "README.md").write_text("What it is.\n")
    return folder
