"""The safetensors reader refuses what the reference refuses; the layout is the reference writer's, byte for byte."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from llmkit.errors import InputError
from llmkit.formats import safetensors
from llmkit.formats.folder import read_folder
from llmkit.tensors.spec import DType, TensorSpec, format_bytes, parse_bytes

DTYPES = [d for d in DType if hasattr(torch, d.torch_name)]


def file_of(path, header, data=b"", pad=0):
    text = (json.dumps(header) if not isinstance(header, str) else header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_layout_is_the_reference_writers(tensors):
    made = {n: torch.zeros(s).to(d.torch) for n, (d, s) in tensors.items()}
    header, offsets, nbytes = safetensors.layout(
        {n: TensorSpec(d, tuple(s)) for n, (d, s) in tensors.items()}, {"format": "pt"}
    )
    reference = save(made, metadata={"format": "pt"})
    assert len(reference) == nbytes
    size = int.from_bytes(reference[:8], "little")
    assert json.loads(header[8:]) == json.loads(reference[8 : 8 + size])
    assert list(json.loads(header[8:])) == list(json.loads(reference[8 : 8 + size]))
    assert set(offsets) == set(tensors)


def test_values_are_read_whole_and_in_rows(tmp_path):
    tensors = {d.name: torch.arange(24).reshape(4, 6).to(d.torch) for d in DTYPES} | {"s": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "m.safetensors")
    lazies, _ = safetensors.read(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        loaded = lazies[name].load()
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, "'a' and 'b' overlap"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, b"x" * 20, "hole of 4 bytes before tensor 'b'"),
        ({"a": entry(0, 8)}, b"x" * 4, "is truncated"),
        ({"a": entry(0, 8)}, b"x" * 9, "1 bytes follow the last tensor"),
        ({"a": entry(0, 12)}, b"x" * 12, "needs 8 bytes"),
        ({"a": entry(0, 8, dtype="F99")}, b"x" * 8, "dtype 'F99'"),
        ({"a": entry(8, 0)}, b"x" * 8, "non-negative"),
        ({"a": {"dtype": "F32"}}, b"", "malformed entry"),
        ({"a": entry(0, 8, shape=(-2,))}, b"x" * 8, "non-negative"),
        ("{not json", b"", "the header is not valid JSON"),
        ("[1, 2]", b"", "expected an object"),
        ('{"a": 1, "a": 2}', b"", "'a' occurs twice"),
    ],
)
def test_malformed_files_are_refused(tmp_path, header, data, message):
    path = file_of(tmp_path / "m.safetensors", header, data)
    with pytest.raises(InputError, match=message) as error:
        safetensors.read(path)
    assert "m.safetensors" in error.value.message


ODD_VALUES = ["true", "-1", "1.0", "1e1", "null", '"1"', "[]", "{}", "NaN", "1e999", "18446744073709551616", "0"]


@pytest.mark.parametrize("odd", ODD_VALUES)
@pytest.mark.parametrize(
    "text",
    [
        '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[%s,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":%s}}',
        '{"a":{"dtype":%s,"shape":[1],"data_offsets":[0,4]}}',
        '{"a":%s}',
        '{"__metadata__":%s,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"__metadata__":{"k":%s},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}',
    ],
)
def test_what_the_reference_refuses_is_refused(tmp_path, text, odd):
    path = file_of(tmp_path / "m.safetensors", text.replace("%s", odd), b"1234")
    try:
        with safe_open(path, "pt") as file:
            wanted = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception:  # noqa: BLE001 - its error is an exception of its own without a public name
        with pytest.raises(InputError, match=r"m\.safetensors"):
            safetensors.read(path)
    else:
        assert {name: lazy.spec.shape for name, lazy in safetensors.read(path)[0].items()} == wanted


def test_header_lengths_are_bounded(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="header length"):
        safetensors.read(path)
    path.write_bytes((100).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="truncated"):
        safetensors.read(path)
    path.write_bytes(b"abc")
    with pytest.raises(InputError, match="too short"):
        safetensors.read(path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_may_not_point_outside_the_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(InputError, match="points outside the folder"):
        read_folder(tmp_path)


def test_an_index_must_agree_with_its_shards(tmp_path):
    save_file({"w": torch.ones(2), "v": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match="1 of 2 shards are missing: model-00002"):
        read_folder(tmp_path)
    save_file({"y": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="'x' should be in model-00002") as caught:
        read_folder(tmp_path)
    assert f"mv {path} {path}.old" in caught.value.hint
    index["weight_map"].pop("x")
    index["weight_map"]["y"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"1 tensors of the shards are not in the index: v") as caught:
        read_folder(tmp_path)
    path.write_text(json.dumps({"weight_map": dict.fromkeys("wv", "model-00001-of-00002.safetensors")}))
    with pytest.raises(InputError, match=r"names no tensor of model-00002-of-00002\S+, of the same set as") as caught:
        read_folder(tmp_path)
    subprocess.run(caught.value.hint.partition(";")[0], shell=True, check=True)
    assert set(read_folder(tmp_path)) == {"w", "v", "y"}
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_folder(tmp_path)
    path.write_text('{"weight_map": [1]}')
    with pytest.raises(InputError, match="no usable weight_map"):
        read_folder(tmp_path)


def test_an_index_that_names_no_tensor_comes_with_a_way_out(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    with pytest.raises(InputError, match=r"index\.json: its weight_map names no tensor") as alone:
        read_folder(tmp_path)
    assert "download the index" in alone.value.hint
    for i in (1, 2):
        save_file({f"w{i}": torch.ones(2)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors, model-00002.* hold 2") as error:
        read_folder(tmp_path)
    subprocess.run(error.value.hint.partition(";")[0], shell=True, check=True)
    assert set(read_folder(tmp_path)) == {"w1", "w2"}


@pytest.mark.parametrize(("first", "second", "named"), [(1, 2, 1), (1, 1, 1), (1, 2, 2)])
def test_a_tensor_in_two_shards_is_what_transformers_takes_or_refused(tmp_path, first, second, named):
    for i, value in ((1, first), (2, second)):
        tensors = {"w": torch.full((2,), float(value)), f"only{i}": torch.ones(1)}
        save_file(tensors, tmp_path / f"model-0000{i}-of-00002.safetensors")
    shards = {"w": named, "only1": 1, "only2": 2}
    index = {"weight_map": {name: f"model-0000{i}-of-00002.safetensors" for name, i in shards.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if named == 1 and first != second:  # transformers reads the files in order, and a later one's tensors win
        with pytest.raises(InputError, match=r"'w' is in model-00001.* and with other values in model-00002"):
            read_folder(tmp_path)
    else:
        assert read_folder(tmp_path)["w"].load().tolist() == [float(second)] * 2


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="git-lfs pointer") as error:
        read_folder(tmp_path)
    assert "git lfs pull" in error.value.hint


def test_a_download_under_way_is_named(tmp_path):
    """aria2 makes a file as long as it will be: what it has not fetched yet would be read as zeros."""
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.aria2").write_bytes(b"\0\1")
    with pytest.raises(InputError, match=r"not fetched whole: beside it lies model\.safetensors\.aria2"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors.aria2").unlink()
    assert set(read_folder(tmp_path)) == {"w"}


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(InputError, match="holds no weights"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5 * 10**9), ("700MiB", 700 * 2**20), ("12", 12), ("1.5 kB", 1500), ("2t", 2 * 10**12)]
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


def test_sizes_that_are_none():
    with pytest.raises(InputError, match="'five' is not a number of bytes"):
        parse_bytes("five")
    assert [format_bytes(n) for n in (5, 1500, 2_200_000_000)] == ["5 B", "1.5 kB", "2.2 GB"]
    with pytest.raises(InputError, match="unknown dtype 'floot16'"):
        DType.parse("floot16")
    assert DType.parse("torch.bfloat16") is DType.BF16
    assert DType.parse("half") is DType.F16


def test_a_tensor_of_very_many_dimensions_is_refused(tmp_path):
    header = {"w": entry(0, 4, [1] * 300_000)}
    with pytest.raises(InputError, match="'w' has 300000 dimensions, expected at most 64"):
        safetensors.read(file_of(tmp_path / "x.safetensors", header, b"0000"))
    file_of(tmp_path / "model.safetensors", {"w": entry(0, 4, [1] * 64)}, b"0000")
    assert read_folder(tmp_path)
