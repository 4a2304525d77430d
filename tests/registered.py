"""Distributions of others, as pip leaves them: a module, and the metadata with its entry points."""

from __future__ import annotations

from pathlib import Path

import pytest


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, group: str, name: str, target: str, code: str) -> None:
    """Put a module under `folder` and register `target` (`module:attribute`) as `name` of an entry-point group."""
    info = folder / f"third_{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: third-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    (folder / f"{target.partition(':')[0]}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
