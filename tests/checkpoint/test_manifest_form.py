"""A manifest of another form is refused where it is read: nothing behind it asks for types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.checkpoint.manifest import load_manifest, recipe_of
from llmkit.errors import InputError

TENSOR = {"file": "m", "dtype": "F32", "shape": [1], "xxh3": "0", "from": {"op": "read", "file": "m", "tensor": "t"}}
SOUND: dict[str, Any] = {
    "format": 1, "recipe": [{"transform": "convert"}], "tensors": {"t": TENSOR}, "run": {},
    "files": {"m": {"nbytes": 4, "header": "0"}}, "inputs": [{"path": "m", "nbytes": 4, "tensors": {}}],
}  # fmt: skip


def written(folder: Path, manifest: object) -> Path:
    (folder / "llmkit.json").write_text(json.dumps(manifest))
    return folder


def test_a_sound_one(tmp_path: Path) -> None:
    assert load_manifest(written(tmp_path, SOUND)) == SOUND


@pytest.mark.parametrize(
    "change",
    [
        {"files": 5}, {"files": None}, {"files": {"m": 5}}, {"files": {"m": {}}}, {"files": {"m": {"nbytes": 4}}},
        {"files": {"m": {"nbytes": True, "xxh3": "0"}}}, {"files": {"m": {"nbytes": -1, "xxh3": "0"}}},
        {"tensors": []}, {"tensors": {"t": []}}, {"tensors": {"t": {**TENSOR, "shape": [1.5]}}},
        {"tensors": {"t": {**TENSOR, "dtype": "F31"}}}, {"tensors": {"t": {**TENSOR, "dtype": []}}},
        {"tensors": {"t": {**TENSOR, "from": {}}}}, {"tensors": {"t": {**TENSOR, "from": {"op": "x", "inputs": [1]}}}},
        {"tensors": {"t": {**TENSOR, "offset": "0"}}}, {"tensors": {"t": {**TENSOR, "file": None}}},
        {"recipe": 5}, {"recipe": [5]}, {"recipe": [{"transform": []}]}, {"run": []}, {"inputs": {}},
        {"inputs": [{"path": 1}]}, {"inputs": [{"path": "m", "tensors": []}]}, {"format": "1"},
    ],
)  # fmt: skip
def test_other_forms(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = written(tmp_path, {**SOUND, **change})
    with pytest.raises(InputError, match="manifest"):
        load_manifest(folder)
    assert recipe_of(folder) == ()
