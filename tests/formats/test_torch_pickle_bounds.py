"""Pickles that are small and would be large, deep or endless when they are read."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch

from llmkit.errors import InputError
from llmkit.formats import safe_pickle, torch_pickle


def shared_tuple(n: int) -> bytes:
    """A tuple that holds the one before twice, n times over: 2 to the n to walk."""
    return b")q\x00" + b"".join(b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(n))


DEEP = b")" + b"\x85" * 200_000
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"


def rebuilt(offset: bytes = b"K\0", shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85") -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + shape + strides + b"\x89}tR"


@pytest.mark.parametrize("odd", [shared_tuple(60), DEEP], ids=["shared", "deep"])
@pytest.mark.parametrize(
    "around",
    [
        lambda odd: b"}(" + odd + rebuilt() + b"u",  # a key
        lambda odd: b"}" + odd + rebuilt() + b"s",
        lambda odd: b"(" + odd + rebuilt() + b"d",
        lambda odd: b"ccollections\nOrderedDict\n](" + odd + rebuilt() + b"\x86e\x85R",
        lambda odd: b"\x8f(" + odd + b"\x900}X\x01\0\0\0w" + rebuilt() + b"s",  # in a set
        lambda odd: b"(" + odd + b"\x910}X\x01\0\0\0w" + rebuilt() + b"s",  # in a frozenset
        lambda odd: b"}X\x01\0\0\0w" + rebuilt(offset=odd) + b"s",
        lambda odd: b"}X\x01\0\0\0w" + rebuilt(shape=odd) + b"s",
        lambda odd: b"}X\x01\0\0\0w" + rebuilt(strides=odd) + b"s",
        lambda odd: b"}X\x01\0\0\0w" + odd + b"s",  # a value that is no tensor
        lambda odd: odd + b"Q",  # a persistent id
        lambda odd: b"c_codecs\nencode\n(X\x01\0\0\0w" + odd + b"tR",
        lambda odd: odd,
    ],
)
def test_tuples_of_any_depth_and_sharing_are_read_or_refused_at_once(tmp_path: Path, around, odd: bytes) -> None:
    """Hashing, comparing and printing walk a tuple: 2 to the 60 steps, or a stack of 200,000 frames."""
    path = zip_of(tmp_path / "m.bin", b"\x80\x02" + around(odd) + b".")
    try:
        found = torch_pickle.read(path)
    except InputError as error:
        message = error.message
    else:
        assert set(found) == {"w"}
        message = str(path)
    assert str(path) in message
    assert len(message) < 1000


def zip_of(path: Path, described: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", described)
        archive.writestr("a/data/0", b"\0" * 16)
    return path


def test_attributes_that_a_pickle_sets_are_dropped(tmp_path: Path) -> None:
    for name in (b"items", b"get", b"values"):
        state = b"ccollections\nOrderedDict\n)R(X\x01\0\0\0w" + rebuilt() + b"u}X" + bytes([len(name), 0, 0, 0]) + name
        path = zip_of(tmp_path / f"{name.decode()}.bin", b"\x80\x02" + state + b"K\x05sb.")
        assert list(torch_pickle.read(path)) == ["w"]


def test_a_view_may_not_make_gigabytes_of_a_small_file(tmp_path: Path) -> None:
    many = b"J" + (120_000_000).to_bytes(4, "little") + b"\x85"
    path = zip_of(tmp_path / "m.bin", b"\x80\x02}X\x01\0\0\0w" + rebuilt(shape=many, strides=b"K\0\x85") + b"s.")
    with pytest.raises(InputError, match=r"'w'.* is a view that repeats its 16 B of storage; strides \[0\]"):
        torch_pickle.read(path)
    saved = tmp_path / "small.bin"
    torch.save({"w": torch.tensor([2.5]).expand(1000, 3)}, saved)
    assert torch.equal(torch_pickle.read(saved)["w"].load(), torch.full((1000, 3), 2.5))


def test_opcodes_are_counted() -> None:
    with pytest.raises(InputError, match="has more than 1000 opcodes"):
        safe_pickle.load(io.BytesIO(b"\x80\x02" + b"N0" * 1000 + b"}."), "m.bin", max_reads=1000)
