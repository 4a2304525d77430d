"""What several modules of tests make of the worlds beside it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def made(tmp_path: Path):
    """A delta that llmkit made, of the models in `base` and `tuned` beside it."""
    import delta_world as world

    from llmkit.api import save
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.transforms import delta

    base = world.checkpoint(tmp_path / "base", world.weights())
    tuned = world.checkpoint(tmp_path / "tuned", world.tuned_of(world.weights()))
    save(delta.make(base, tuned), tmp_path / "made")
    return open_checkpoint(tmp_path / "made")


@pytest.fixture
def model(tmp_path: Path):
    """Makes the tiny random model of a family, and opens it."""
    import family_world as world

    from llmkit.checkpoint.checkpoint import open_checkpoint

    return lambda family="llama": open_checkpoint(world.written(tmp_path / family, family, None))
