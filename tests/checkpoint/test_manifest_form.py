"""A manifest of another form is refused where it is read: nothing behind it asks for types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.checkpoint.manifest import is_sealed, load_manifest, recipe_of
from llmkit.errors import InputError
from llmkit.inspection.expression import explain
from llmkit.tensors.lazy import Apply, Lazy, Read
from llmkit.tensors.nodes import NodeTable
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec

TENSOR = {"file": "m", "dtype": "F32", "shape": [1], "xxh3": "0", "from": 0}
READ = {"op": "read", "file": "m", "tensor": "t"}
SOUND: dict[str, Any] = {
    "format": 2, "nodes": [READ, {"op": "add", "inputs": [0, 0]}],
    "recipe": [{"transform": "convert"}], "tensors": {"t": TENSOR}, "run": {},
    "files": {"m": {"nbytes": 4, "header": "0"}}, "inputs": [{"path": "m", "nbytes": 4, "tensors": {}}],
}  # fmt: skip


def written(folder: Path, manifest: object) -> Path:
    (folder / "llmkit.json").write_text(json.dumps(manifest))
    return folder


def test_a_sound_one(tmp_path: Path) -> None:
    assert load_manifest(written(tmp_path, SOUND)) == SOUND


def test_one_of_format_1_is_explained_as_before(tmp_path: Path) -> None:
    """Its tensors hold their whole expressions; the file was written by the version before."""
    old = json.loads((Path(__file__).parent / "manifest_format_1.json").read_text())
    assert explain(written(tmp_path, old), "c")["from"] == old["tensors"]["c"]["from"]
    assert is_sealed(load_manifest(tmp_path))


def test_equal_nodes_share_an_id() -> None:
    def read() -> Lazy:
        return Read("t", TensorSpec(DType.F32, (2,)), SourceFile(Path(__file__)), 0).output()

    table = NodeTable()
    both = [Apply("add", [read(), read()], TensorSpec(DType.F32, (2,)), lambda x, y: x + y) for _ in range(2)]
    assert [table.add(node.output()) for node in both] == [1, 1]
    assert table.nodes[1] == {"op": "add", "spec": "F32[2]", "inputs": [0, 0]}
    assert len(table.nodes) == 2


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
        {"tensors": {"t": {**TENSOR, "from": 2}}}, {"tensors": {"t": {**TENSOR, "from": -1}}}, {"nodes": {}},
        {"nodes": [{"op": "add", "inputs": [0]}]}, {"nodes": [READ, {"op": "add", "inputs": [READ]}]}, {"nodes": [5]},
        {"nodes": [READ, *({"op": "add", "inputs": [i, i]} for i in range(40))]},  # 2**40 nodes, written out
    ],
)  # fmt: skip
def test_other_forms(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = written(tmp_path, {**SOUND, **change})
    with pytest.raises(InputError, match="manifest"):
        load_manifest(folder)
    assert recipe_of(folder) == ()
