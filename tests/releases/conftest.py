"""The program called as a user calls it, and a base with its tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from release_world import write_hf


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys, monkeypatch):
    from llmkit.cli.app import main

    monkeypatch.setenv("COLUMNS", "100")

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in args])
        return Result(code, *capsys.readouterr())

    return run


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
