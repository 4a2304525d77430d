"""Our torch files against torch.load, Python's zipfile and our own reader."""

from __future__ import annotations

import zipfile
import zlib

import pytest
import torch

from llmkit.errors import SpecError
from llmkit.formats import torch_pickle
from llmkit.formats.torch_zip import TorchFiles, TorchNamedFiles
from llmkit.tensors.spec import DType, TensorSpec

DTYPES = [DType.F64, DType.F32, DType.F16, DType.BF16, DType.I64, DType.I32, DType.I16, DType.I8, DType.U8, DType.BOOL]


def spec_of(x):
    return TensorSpec(DType.of(x.dtype), tuple(x.shape))


def raw(x):
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def write(folder, layout, data):
    """What the runner does: fixed bytes, tensors at their offsets, then what the CRCs decide."""
    for file in layout.files:
        content = bytearray(file.nbytes)
        chunks = list(file.fixed) + [(offset, raw(data[key])) for key, offset in file.offsets.items()]
        chunks += file.finish({key: zlib.crc32(raw(data[key])) for key in file.offsets})
        for offset, piece in chunks:
            content[offset : offset + len(piece)] = piece
        assert len(content) == file.nbytes
        (folder / file.name).write_bytes(content)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (3, 5, 8), generator=g, dtype=torch.uint8)
    found = {f"t.{d.name}": bits.to(d.torch) for d in DTYPES}
    return found | {
        "scalar": torch.tensor(2.5), "empty": torch.empty(0, 7), "wide": torch.randn(1, 9, generator=g),
        "名前.weight": torch.randn(4, 3, generator=g),
    }  # fmt: skip


@pytest.mark.parametrize("limit", [1, 300, 10**9])
def test_torch_and_zipfile_read_what_is_written(tmp_path, data, limit):
    layout = TorchFiles().lay_out({k: spec_of(v) for k, v in data.items()}, limit)
    write(tmp_path, layout, data)
    assert len(layout.files) == {1: len(data), 10**9: 1}.get(limit, len(layout.files))
    found, ours = {}, {}
    for file in layout.files:
        path = tmp_path / file.name
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        for is_mapped in (False, True):
            found |= torch.load(path, weights_only=True, mmap=is_mapped)
        ours |= torch_pickle.read(path)
        for offset in file.offsets.values():
            assert offset % 64 == 0
    for got in (found, {k: v.load() for k, v in ours.items()}):
        assert list(got) == list(data)
        for name, tensor in data.items():
            assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
            assert got[name].is_contiguous()
            assert torch.equal(got[name], tensor)


def test_offsets_are_those_the_reader_finds(tmp_path, data):
    layout = TorchFiles().lay_out({k: spec_of(v) for k, v in data.items()}, 10**9)
    write(tmp_path, layout, data)
    ours = torch_pickle.read(tmp_path / "pytorch_model.bin")
    assert {k: v.node.offset for k, v in ours.items() if v.spec.nbytes} == {
        k: o for k, o in layout.files[0].offsets.items() if data[k].numel()
    }


def test_the_same_name_in_two_files(tmp_path, data):
    container = TorchNamedFiles({f"part.{i}.pth": ((f"{i}/w", "w"), ("n", "norm"))[: 2 - i] for i in range(2)})
    held = {"0/w": data["wide"], "1/w": data["wide"] + 1, "n": data["scalar"]}
    write(tmp_path, container.lay_out({k: spec_of(v) for k, v in held.items()}, 1), held)
    first, second = (torch.load(tmp_path / f"part.{i}.pth", weights_only=True) for i in range(2))
    assert list(first) == ["w", "norm"]
    assert torch.equal(first["w"], held["0/w"])
    assert torch.equal(second["w"], held["1/w"])
    with pytest.raises(SpecError, match=r"part.0.pth and part.1.pth has no place for x and lacks n"):
        container.lay_out({"0/w": spec_of(data["wide"]), "1/w": spec_of(data["wide"]), "x": spec_of(data["wide"])}, 1)


def test_a_dtype_without_a_storage_is_refused():
    with pytest.raises(SpecError, match=r"w is F8_E4M3, which a torch file's storages do not know") as caught:
        TorchFiles().lay_out({"w": TensorSpec(DType.F8_E4M3, (2,))}, 1)
    assert caught.value.hint == "convert with --to hf"


def test_beyond_four_gigabytes_the_zip_is_a_zip64(tmp_path):
    """A sparse file: one tensor of 4.4 GB and one that begins beyond 4 GiB, read by zipfile and by torch, mapped."""
    specs = {"big": TensorSpec(DType.U8, (1100, 4_000_000)), "late": TensorSpec(DType.F32, (3,))}
    (file,) = TorchFiles().lay_out(specs, 10**12).files
    late = torch.tensor([1.0, 2.0, 3.0])
    path = tmp_path / file.name
    with path.open("wb") as out:
        out.truncate(file.nbytes)
        for offset, piece in [*file.fixed, *file.finish({"big": 0x1234, "late": zlib.crc32(raw(late))})]:
            out.seek(offset)
            out.write(piece)
        out.seek(file.offsets["late"])
        out.write(raw(late))
    with zipfile.ZipFile(path) as archive:
        sizes = {e.filename: e.file_size for e in archive.infolist()}
        assert sizes["archive/data/0"] == 4_400_000_000
        assert archive.read("archive/data/1") == raw(late)  # checks the CRC
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["big"].shape == (1100, 4_000_000)
    assert torch.equal(found["late"], late)
    assert torch.equal(torch_pickle.read(path)["late"].load(), late)


@pytest.mark.slow
def test_more_entries_than_a_plain_directory_counts(tmp_path):
    held = {f"t{i}": torch.tensor([float(i)]) for i in range(0xFFFF)}
    spec = TensorSpec(DType.F32, (1,))
    layout = TorchFiles().lay_out(dict.fromkeys(held, spec), 10**12)
    write(tmp_path, layout, held)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as archive:
        assert len(archive.infolist()) == 0xFFFF + 3
        assert archive.read("archive/data/65534") == raw(held["t65534"])
