"""The reader of EasyLM's streams against the msgpack package, and against what is no such stream."""

from __future__ import annotations

import pytest
import torch

from llmkit.errors import InputError
from llmkit.formats import msgpack_stream

msgpack = pytest.importorskip("msgpack")


def pair(keys, shape, dtype, data, ext=1):
    inner = msgpack.packb((shape, dtype, data), use_bin_type=True)
    return msgpack.packb((keys, msgpack.packb(msgpack.ExtType(ext, inner), strict_types=True)))


@pytest.mark.parametrize("n", [1, 3, 10, 60, 300, 70_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int32"])
def test_every_size_of_head(tmp_path, n, dtype):
    x = torch.arange(n).to(getattr(torch, dtype))
    raw = x.view(torch.uint8).numpy().tobytes()
    keys = [["k" * length, "b"] for length in (1, 31, 32, 300)]
    path = tmp_path / "s"
    path.write_bytes(b"".join(pair(k, (n,), dtype, raw) for k in keys) + pair(["s"], (), dtype, raw[: x.itemsize]))
    head = path.read_bytes()[:16]
    assert msgpack_stream.looks_like(head)
    found = msgpack_stream.read(path)
    assert list(found) == [".".join(k) for k in keys] + ["s"]
    for k in keys:
        assert torch.equal(found[".".join(k)].load(), x)
    assert torch.equal(found["s"].load(), x[0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pair(["a"], (2,), "float32", b"1234"), r"a: F32\[2\] needs 8 bytes, the file has 4"),
        (pair(["a"], (1,), "float4", b"1"), "a: dtype 'float4' is not supported"),
        (pair(["a"], (1,), "uint8", b"1", ext=3), "a is no array"),
        (pair(["a"], (1,), "uint8", b"1") * 2, "key 'a' occurs twice"),
        (pair(["a"] * 40, (1,), "uint8", b"1"), "40 is more than 32"),
        (msgpack.packb((["a"], 7)), "expected bin, found byte 0x07"),
        (msgpack.packb((["a"], b"xx")), "expected ext, found byte 0x78"),
        (msgpack.packb(([3], b"xx")), "expected text, found byte 0x03"),
        (pair(["a"], (1,), "uint8", b"1") + b"\x01", "expected array, found byte 0x01"),
        (pair(["a"], (1,), "uint8", b"1")[:-1], "a should end at byte"),
    ],
)
def test_what_is_refused(tmp_path, data, message):
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        msgpack_stream.read(tmp_path / "s")
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_every_cut_is_an_error(tmp_path):
    data = pair(["params", "w"], (3,), "float32", b"0" * 12)
    for n in range(1, len(data)):
        (tmp_path / "s").write_bytes(data[:n])
        with pytest.raises(InputError):
            msgpack_stream.read(tmp_path / "s")
