"""Headers of GGUF files: what the gguf library writes is read, and what is malformed is refused in one line."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmkit.errors import InputError
from llmkit.formats.gguf_files import find_gguf, read_model
from llmkit.formats.gguf_header import encode_header, read_header
from llmkit.formats.gguf_types import TYPE_BY_NAME, TYPES

METADATA = {
    "a.string": "Wörter \n 你好", "a.bool": True, "a.int": 7, "a.float": 1.5, "strings": ["", "x" * 300, "é"],
    "numbers": [1, -2, 3], "floats": [0.5, -1.0],
}  # fmt: skip


def write(path: Path, *, alignment: int | None = None, vocabulary: int = 0, endian=gguf.GGUFEndian.LITTLE) -> Path:
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    for key, value in METADATA.items():
        adds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        adds.get(type(value), writer.add_array)(key, value)
    if alignment:
        writer.add_custom_alignment(alignment)
    if vocabulary:
        writer.add_token_list([f"token {i}" * (i % 7) for i in range(vocabulary)])
    writer.add_tensor("x.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("y", np.arange(5, dtype=np.float16))
    writer.add_tensor("z", np.arange(34 * 2, dtype=np.uint8).reshape(2, 34), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64])
def test_reads_what_the_library_reads(tmp_path, alignment):
    path = write(tmp_path / "x.gguf", alignment=alignment, vocabulary=40_000)
    mine, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert mine.metadata == fields
    assert [(t.name, t.type.code, t.shape, t.offset, t.nbytes) for t in mine.tensors] == [
        (t.name, int(t.tensor_type), tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes))
        for t in theirs.tensors
    ]


def test_the_types_are_the_librarys():
    sizes = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    newer = {42: ("Q2_0", 64, 18)}  # of ggml
    assert {code: (t.name, t.block, t.nbytes) for code, t in TYPES.items()} == sizes | newer
    from gguf import quants

    known = {t.name for t in quants._type_traits} - {"BF16"}
    assert {t.name for t in TYPES.values() if t.dtype is None and t.is_known} == known | {"Q1_0", "Q2_0"}


def test_encoded_headers_are_read_by_the_library(tmp_path):
    tensors = [
        ("a", TYPE_BY_NAME["Q4_0"], (3, 64)),
        ("b", TYPE_BY_NAME["F32"], (5,)),
        ("c", TYPE_BY_NAME["F16"], (2, 3)),
    ]
    header, offsets, nbytes = encode_header({"general.architecture": "llama", **METADATA}, tensors)
    (tmp_path / "x.gguf").write_bytes(header.ljust(nbytes, b"\0"))
    found = gguf.GGUFReader(tmp_path / "x.gguf")
    assert {k: f.contents() for k, f in found.fields.items() if k in METADATA} == METADATA
    assert found.fields["a.int"].types == [gguf.GGUFValueType.UINT32]
    assert found.fields["numbers"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert [(t.name, t.tensor_type.name, t.shape.tolist(), int(t.data_offset)) for t in found.tensors] == [
        ("a", "Q4_0", [64, 3], offsets["a"]), ("b", "F32", [5], offsets["b"]), ("c", "F16", [3, 2], offsets["c"]),
    ]  # fmt: skip
    assert nbytes == max(int(t.data_offset) for t in found.tensors) + 32


def _pack(version: int = 3, tensors: int = 0, pairs: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body


def _key(key: bytes, code: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", code) + value


def _tensor(name: bytes = b"t", dims: tuple[int, ...] = (8,), code: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


MALFORMED = {
    "magic": (b"GGML" + bytes(40), "is no GGUF file"),
    "short": (b"GGUF\3\0\0\0", "is truncated: its header goes on beyond byte 8"),
    "version 1": (_pack(version=1), "is GGUF version 1; versions 2 and 3 are read"),
    "version 4": (_pack(version=4), "is GGUF version 4"),
    "big-endian": (_pack(version=3 << 24), "is a big-endian GGUF file (version 3)"),
    "tensor count": (_pack(tensors=2**62), "4611686018427387904 tensors do not fit into the 0 bytes that are left"),
    "pair count": (_pack(pairs=2**40), "1099511627776 metadata entries do not fit"),
    "key length": (_pack(pairs=1, body=struct.pack("<Q", 2**50) + bytes(40)), "bytes of a metadata key do not fit"),
    "string length": (_pack(pairs=1, body=_key(b"k", 8, struct.pack("<Q", 2**33))), "8589934592 bytes of k do not fit"),
    "array length": (_pack(pairs=1, body=_key(b"k", 9, struct.pack("<IQ", 4, 2**40))), "values of k do not fit"),
    "strings": (_pack(pairs=1, body=_key(b"k", 9, struct.pack("<IQ", 8, 2**40))), "strings of k do not fit"),
    "array of arrays": (_pack(pairs=1, body=_key(b"k", 9, struct.pack("<IQ", 9, 1))), "array of type 9"),
    "value type": (_pack(pairs=1, body=_key(b"k", 13, b"\0")), "k is of type 13, which is not known"),
    "twice": (_pack(pairs=2, body=_key(b"k", 0, b"\0") * 2), "metadata key 'k' comes twice"),
    "cut in a value": (_pack(pairs=1, body=_key(b"k", 10, b"\0")), "its header goes on beyond byte"),
    "alignment": (
        _pack(pairs=1, body=_key(b"general.alignment", 4, struct.pack("<I", 0))),
        "general.alignment is 0, expected a power of two",
    ),
    "dimensions": (_pack(tensors=1, body=_tensor(dims=(2,) * 9)), "t has 9 dimensions"),
    "ggml type": (_pack(tensors=1, body=_tensor(code=77)), "t is of ggml type 77"),
    "zero size": (_pack(tensors=1, body=_tensor(dims=(0, 4))), "shape [4, 0]"),
    "huge size": (_pack(tensors=1, body=_tensor(dims=(2**60, 4))), "which F32 cannot store"),
    "block": (_pack(tensors=1, body=_tensor(dims=(33,), code=8)), "shape [33], which Q8_0 cannot store"),
    "offset": (_pack(tensors=1, body=_tensor(offset=8) + bytes(99)), "t is not aligned to 32 bytes"),
    "overlap": (
        _pack(tensors=2, body=_tensor(dims=(16,)) + _tensor(b"u", (4,), 0, 32) + bytes(199)),
        "the data of u overlaps that of t",
    ),
    "same name": (_pack(tensors=2, body=_tensor() + _tensor(offset=32) + bytes(199)), "tensor 't' comes twice"),
    "beyond the end": (_pack(tensors=1, body=_tensor(dims=(64,)) + bytes(50)), "is truncated: t ends at byte 320"),
    "far beyond the end": (_pack(tensors=1, body=_tensor(offset=2**62) + bytes(50)), "is truncated: t ends at byte"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers_are_refused(tmp_path, case):
    data, message = MALFORMED[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = write(tmp_path / "whole.gguf").read_bytes()
    last = read_header(tmp_path / "whole.gguf").tensors[-1]
    for n in range(0, last.offset + last.nbytes, 13):
        (tmp_path / "x.gguf").write_bytes(data[:n])
        with pytest.raises(InputError, match=r"is truncated" if n >= 4 else "is no GGUF file") as caught:
            read_header(tmp_path / "x.gguf")
        assert caught.value.hint == "download or copy the file again"


def test_version_2_is_version_3(tmp_path):
    data = bytearray(write(tmp_path / "x.gguf").read_bytes())
    before = read_header(tmp_path / "x.gguf")
    data[4] = 2
    (tmp_path / "x.gguf").write_bytes(data)
    after = read_header(tmp_path / "x.gguf")
    assert (after.version, after.metadata, after.tensors) == (2, before.metadata, before.tensors)


def test_the_librarys_big_endian_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="big-endian"):
        read_header(write(tmp_path / "x.gguf", endian=gguf.GGUFEndian.BIG))


def split(folder: Path) -> Path:
    writer = gguf.GGUFWriter(None, "llama", split_max_tensors=1)
    for i in range(3):
        writer.add_tensor(f"t{i}", np.full((2, 4), i, dtype=np.float32))
    writer.write_header_to_file(folder / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m-00001-of-00003.gguf"


def test_parts_are_read_together(tmp_path):
    first = split(tmp_path)
    for path in (first, tmp_path / "m-00003-of-00003.gguf", find_gguf(tmp_path)):
        model = read_model(path)
        assert (list(model.tensors), model.label) == (["t0", "t1", "t2"], "m")
        assert model.metadata["general.architecture"] == "llama"


def test_parts_that_are_missing_or_renamed_are_named(tmp_path):
    first = split(tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "other.gguf")
    with pytest.raises(InputError, match=r"1 of 3 parts of m are missing: m-00002-of-00003\.gguf"):
        read_model(first)
    with pytest.raises(InputError, match=r"is one of 3 parts, whose names should end in -0000N-of-00003\.gguf"):
        read_model(tmp_path / "other.gguf")
    with pytest.raises(InputError, match="holds 2 GGUF models"):
        find_gguf(tmp_path)
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "other.gguf").rename(tmp_path / "m-00003-of-00003.gguf")
    with pytest.raises(InputError, match="says that it is part 3, its name says part 2"):
        read_model(first)


@pytest.mark.parametrize("value", [1e300, 2**40, -1, [1, 2**40]])
def test_a_number_that_no_field_holds_is_refused_by_name(value):
    with pytest.raises(InputError, match=r"llama\.x is .*, which no 32 bits of a GGUF hold"):
        encode_header({"llama.x": value}, [])


@pytest.mark.parametrize(
    ("n_tensors", "n_pairs", "tail"),
    [
        (2**24, 0, b""), (0, 2**30, b""), (0, 1, struct.pack("<QIIQ", 0, 9, 0, 2**32)),
        (0, 1, struct.pack("<QIIQ", 0, 9, 8, 2**24)), (0, 1, struct.pack("<QIQ", 0, 8, 2**33)),
    ],
)  # fmt: skip
def test_gigabytes_of_header_in_a_sparse_file(tmp_path, n_tensors, n_pairs, tail):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + tail)
    os.truncate(path, 2**36)
    with pytest.raises(InputError, match="malformed header"):
        read_header(path)


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf"])
def test_a_part_beyond_all_parts(tmp_path, name):
    write(tmp_path / name)
    with pytest.raises(InputError, match="is named as part"):
        read_model(tmp_path / name)
