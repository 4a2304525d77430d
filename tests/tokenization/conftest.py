"""The tokenizers of tests/transforms/vocab_world.py serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transforms"))


@pytest.fixture(scope="session")
def world():
    import vocab_world

    return vocab_world
