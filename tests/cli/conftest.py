"""A tiny model with a tokenizer, and the program called as a user calls it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from word_model import write_model

from llmkit.pipeline import sharing


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of words that the tokenizer of `write_model` has."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i % 97}" for i in range(1500)))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; read only."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Another tiny model, to be damaged."""
    return write_model(tmp_path / "model", seed=1)


@pytest.fixture
def hard_links(monkeypatch):
    """Files are shared by hard links, whatever disk the tests run on."""

    def refuse(*_args):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(sharing.fcntl, "ioctl", refuse)
