"""A graph's data is read inside its folder only, and what protobuf does not check is checked here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx")

from llmkit.errors import InputError  # noqa: E402
from llmkit.formats.onnx_graph import read_graph  # noqa: E402


def graph(folder: Path, change: Callable[[onnx.ModelProto], object] = lambda model: None) -> Path:
    folder.mkdir()
    (folder / "w").write_bytes(b"\0" * 16)
    held = onnx.TensorProto(name="t", data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=1)
    for key, value in (("location", "w"), ("offset", "0"), ("length", "16")):
        held.external_data.add(key=key, value=value)
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    node = onnx.helper.make_node("Identity", ["t"], ["y"], name="n")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [value], [held]))
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def entry(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(e for e in model.graph.initializer[0].external_data if e.key == key).value = value

    return change


def test_a_sound_graph(tmp_path: Path) -> None:
    assert read_graph(graph(tmp_path / "x")).graph.initializer[0].name == "t"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (entry("location", "../secret"), "outside"),
        (entry("location", "w/../../secret"), "outside"),
        (entry("location", "/etc/passwd"), "outside"),
        (entry("location", "link"), "outside"),
        (entry("location", "absent"), "not there"),
        (entry("location", ""), "location"),
        (entry("offset", "x"), "offset"),
        (entry("offset", "-1"), "offset"),
        (entry("offset", "9" * 18), "ends at byte"),
        (entry("length", "17"), "ends at byte"),
        (entry("length", "8"), "8 bytes of w; its shape and type have 16"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -4), "shape"),
        (lambda m: m.graph.node.append(onnx.helper.make_node("MatMulNBits", ["t"], ["z"])), "lacks"),
        (lambda m: m.graph.node[0].output.pop(), "lacks"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, change: Callable[[onnx.ModelProto], None], word: str) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 16)
    path = graph(tmp_path / "x", change)
    (tmp_path / "x/link").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=word):
        read_graph(path)


def test_a_tensor_inside_a_node_is_no_way_out(tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        inner = onnx.TensorProto(name="c", data_type=1, dims=[4], data_location=1)
        inner.external_data.add(key="location", value="../secret")
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=inner))

    with pytest.raises(InputError, match="outside"):
        read_graph(graph(tmp_path / "x", change))


def test_the_hub_cache_keeps_data_in_its_blobs(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs/1").write_bytes(b"\0" * 16)
    path = graph(tmp_path / "snapshots/main")
    path.with_name("w").unlink()
    path.with_name("w").symlink_to("../../blobs/1")
    read_graph(path)


def test_text_that_is_no_graph(tmp_path: Path) -> None:
    for n, data in enumerate((b"", b"text", b"\x08\xff\xff", b"\0" * 100)):
        (tmp_path / str(n)).write_bytes(data)
        with pytest.raises(InputError):
            read_graph(tmp_path / str(n))


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    """protobuf gives such a string as bytes."""
    path = graph(tmp_path / "x", lambda model: setattr(model.graph.node[0], "name", "a_node_name"))
    path.write_bytes(path.read_bytes().replace(b"a_node_name", b"a_\xffode_name"))
    with pytest.raises(InputError, match="a name in the graph is no UTF-8"):
        read_graph(path)
