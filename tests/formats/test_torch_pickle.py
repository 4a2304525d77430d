"""Pickles against torch.save itself, and against files that mean harm."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from llmkit.errors import InputError
from llmkit.formats import safe_pickle, torch_pickle
from llmkit.formats.folder import read_file
from llmkit.tensors.spec import DType

BOTH = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def save(value: object, path: Path, is_zip: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(found: dict, expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        data = found[name].load()
        assert data.dtype == tensor.dtype
        assert found[name].shape == tuple(tensor.shape) == tuple(data.shape)
        assert torch.equal(raw_bytes(data), raw_bytes(tensor))


@BOTH
@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.name)
def test_every_dtype_equals_torch(tmp_path: Path, is_zip: bool, dtype: DType) -> None:
    torch.manual_seed(0)
    raw = torch.randint(0, 2 if dtype is DType.BOOL else 127, (6, 5 * dtype.itemsize), dtype=torch.uint8)
    tensor = raw.view(dtype.torch)
    path = save({"a": tensor, "b": tensor[2:4], "c": tensor[0, 0].clone()}, tmp_path / "m.bin", is_zip)
    same(torch_pickle.read(path), {"a": tensor, "b": tensor[2:4], "c": tensor[0, 0]})


@BOTH
def test_views_ties_parameters_and_odd_shapes(tmp_path: Path, is_zip: bool) -> None:
    torch.manual_seed(1)
    base = torch.randn(6, 8)
    state = collections.OrderedDict(
        whole=base,
        transposed=base.T,
        column=base[:, 3],
        block=base[2:5, 1:7],
        expanded=torch.randn(1, 4).expand(3, 4),
        tied=base,
        parameter=torch.nn.Parameter(torch.randn(3)),
        empty=torch.empty(0, 4),
        scalar=torch.tensor(2.5),
        one_row=base[1:2].T[:, :1],
    )
    state._metadata = {"": {"version": 1}}  # what Module.state_dict() adds: a BUILD on the ordered dict
    found = torch_pickle.read(save(state, tmp_path / "m.bin", is_zip))
    same(found, dict(state))
    assert found["tied"].node.offset == found["whole"].node.offset
    assert found["whole"].node.strides is None
    assert found["block"].node.strides == (8, 1)
    assert found["transposed"].node.row_step is None


@BOTH
def test_module_state_dict_and_attributes(tmp_path: Path, is_zip: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[0].weight.note = "kept by torch"
    tagged = torch.randn(2)
    tagged.note = 1
    state = {**dict(module.named_parameters()), **dict(module.named_buffers()), "tagged": tagged}
    same(torch_pickle.read(save(state, tmp_path / "m.pt", is_zip)), state)


@BOTH
@pytest.mark.parametrize("path_in", [(), ("state_dict",), ("model",), ("module", "state_dict")])
def test_nested_mappings(tmp_path: Path, is_zip: bool, path_in: tuple[str, ...]) -> None:
    inner: dict = {"w": torch.arange(4.0), "note": "text", "step": 3}
    for key in reversed(path_in):
        inner = {"epoch": 3, key: inner, "lr": 0.1, "dtype": torch.float16, "shape": torch.Size([2]), "ids": {1, 2}}
    same(torch_pickle.read(save(inner, tmp_path / "m.ckpt", is_zip)), {"w": torch.arange(4.0)})


@pytest.mark.parametrize("path_in", [("model",), ("module", "state_dict")])
def test_tensors_of_a_training_state_beside_the_model(tmp_path: Path, path_in: tuple[str, ...]) -> None:
    weights = inner = {"a": torch.arange(4.0), "b": torch.ones(2)}
    for key in reversed(path_in):
        inner = {key: inner, "rng": torch.get_rng_state(), "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}}
    same(torch_pickle.read(save(inner, tmp_path / "m.ckpt", True)), weights)


def test_numpy_scalars_are_harmless(tmp_path: Path) -> None:
    import numpy

    state = {"model": {"w": torch.ones(2)}, "loss": numpy.float64(0.5), "seen": numpy.arange(3)}
    same(torch_pickle.read(save(state, tmp_path / "m.pt", True)), {"w": torch.ones(2)})


def test_a_renamed_file_and_other_pickle_protocols(tmp_path: Path) -> None:
    state = {"w": torch.arange(8.0)}
    path = save(state, tmp_path / "first.bin", True).rename(tmp_path / "second.bin")
    same(read_file(path), state)
    for protocol in (2, 3, 4, 5):
        for is_zip in (True, False):
            torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
            same(read_file(path), state)


def test_zip_entries_with_other_padding_are_found_by_their_local_header(tmp_path: Path) -> None:
    state = {"w": torch.arange(8.0), "v": torch.arange(3)}
    source = save(state, tmp_path / "a.bin", True)
    rewritten = tmp_path / "b.bin"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(rewritten, "w") as new:
        for info in old.infolist():
            new.writestr(zipfile.ZipInfo(info.filename.replace("a/", "deep/er/", 1)), old.read(info))
    same(torch_pickle.read(rewritten), state)


class Gadget:
    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


def zip_with(path: Path, described: bytes, root: str = "archive", **extra: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", described)
        for name, data in extra.items():
            archive.writestr(f"{root}/{name.replace('__', '/')}", data)
    return path


MALICIOUS = {
    "os.system": (b"cos\nsystem\n(S'touch {mark}'\ntR.", "posix.system|os.system"),
    "eval": (b"c__builtin__\neval\n(S'1'\ntR.", "__builtin__.eval"),
    "getattr": (b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.", "builtins.getattr"),
    "torch.load": (b"ctorch\nload\n(S'x'\ntR.", "torch.load"),
    "torch.hub": (b"ctorch.hub\nload\n(S'x'\ntR.", "torch.hub.load"),
    "dotted name": (
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        "collections.OrderedDict.__init__",
    ),
    "import only": (b"cantigravity\nfly\n.", "antigravity.fly"),
    "numpy runstring": (b"cnumpy.testing._private.utils\nrunstring\n.", "numpy.testing._private.utils.runstring"),
    "codecs": (b"c_codecs\ndecode\n.", "_codecs.decode"),
    "copyreg": (b"ccopyreg\n_reconstructor\n.", "copyreg._reconstructor"),
    "functools": (b"cfunctools\npartial\n.", "functools.partial"),
}


@pytest.mark.parametrize("name", list(MALICIOUS))
@BOTH
def test_globals_are_refused_by_name(tmp_path: Path, name: str, is_zip: bool) -> None:
    described, refused = MALICIOUS[name]
    mark = tmp_path / "mark"
    described = described.replace(b"{mark}", str(mark).encode())
    path = tmp_path / "m.bin"
    if is_zip:
        zip_with(path, described)
    else:
        head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(head + described)
    with pytest.raises(InputError) as caught:
        torch_pickle.read(path)
    assert any(f"run {r}," in caught.value.message for r in refused.split("|"))
    assert str(path) in caught.value.message
    assert caught.value.hint is not None
    assert not mark.exists()


def test_a_bare_pickle_is_refused_before_it_runs(tmp_path: Path) -> None:
    import os

    path = tmp_path / "m.bin"
    path.write_bytes(pickle.dumps(Gadget(os.system, f"touch {tmp_path / 'mark'}")))
    with pytest.raises(InputError, match=r"(posix|os|nt)\.system"):
        read_file(path)
    assert not (tmp_path / "mark").exists()
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(InputError, match="a pickle but no PyTorch checkpoint"):
        read_file(path)


TRICKS = {
    # BUILD on a stand-in must not change it; the same stand-in serves every file.
    "build on function": b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'function'\ncos\nsystem\nstb.",
    "build attributes": b"ctorch._utils\n_rebuild_parameter\n}S'name'\nS'x'\nsb.",
    "build on storage type": b"ctorch\nFloatStorage\n(N}S'dtype'\nNstb.",
    "newobj": b"\x80\x02ctorch\nSize\n)\x81.",
    "inst": b"(icollections\nOrderedDict\n.",
    "extension": b"\x80\x02\x82\x01.",
    "bytearray of 2**40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "unicode of 2**40": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "frame of 2**40": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"x.",
    "stack underflow": b"R.",
    "no stop": b"}",
    "empty": b"",
    "unknown opcode": b"\xff.",
    "missing memo": b"h\x07.",
    "encode with a codec": b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.",
    "tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00K\x00Nt R.",
    "rebuild calls what it is given": b"ctorch._tensor\n_rebuild_from_type_v2\n(S'x'\nNNNtR.",
    "persistent id in text": b"P0\n.",
    "call a value": b"K\x01)R.",
    "unhashable key": b"}]K\x01s.",
}


@pytest.mark.parametrize("name", list(TRICKS))
def test_stack_tricks_are_input_errors(tmp_path: Path, name: str) -> None:
    path = zip_with(tmp_path / "m.bin", TRICKS[name])
    with pytest.raises(InputError) as caught:
        torch_pickle.read(path)
    assert str(path) in caught.value.message
    same(torch_pickle.read(save({"w": torch.ones(2)}, tmp_path / "ok.bin", True)), {"w": torch.ones(2)})


def test_a_huge_memo_index_costs_nothing(tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = zip_with(tmp_path / "m.bin", b"\x80\x02}r\xfe\xff\xff\xff.")
    with pytest.raises(InputError, match="no tensors"):
        torch_pickle.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


class Sparse(io.FileIO):
    """A file in which long zeros are a hole."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        return super().write(data) if len(data) < 2**20 else self.seek(len(data), io.SEEK_CUR) and len(data)


def test_the_pickle_is_bounded(tmp_path: Path) -> None:
    with Sparse(tmp_path / "m.bin", "w") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(256_000_001))
    with pytest.raises(InputError, match="256000001 bytes long, more than 256000000"):
        torch_pickle.read(tmp_path / "m.bin")
    with pytest.raises(InputError, match="longer than 1000 bytes"):
        safe_pickle.load(io.BytesIO(pickle.dumps("a" * 1000, 2)), "m.bin", max_nbytes=1000)


@BOTH
def test_every_truncation_is_a_clear_error(tmp_path: Path, is_zip: bool) -> None:
    whole = save({"a": torch.randn(30), "b": torch.randn(4, 4)}, tmp_path / "m.bin", is_zip).read_bytes()
    cut = tmp_path / "cut.bin"
    for nbytes in range(2, len(whole), 41):
        cut.write_bytes(whole[:nbytes])
        with pytest.raises(InputError, match=str(cut)):
            torch_pickle.read(cut)


def edit_pickle(source: Path, target: Path, old: bytes, new: bytes) -> Path:
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for info in before.infolist():
            data = before.read(info)
            if info.filename.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            after.writestr(zipfile.ZipInfo(info.filename), data)
    return target


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    source = save({"w": torch.arange(8.0)}, tmp_path / "m.bin", True)
    longer = edit_pickle(source, tmp_path / "longer.bin", b"K\x08\x85", b"K\x09\x85")
    with pytest.raises(InputError, match=r"'w'.*reaches beyond its storage of 32 bytes"):
        torch_pickle.read(longer)
    claims = edit_pickle(source, tmp_path / "claims.bin", b"K\x08", b"K\x10")
    with pytest.raises(InputError, match=r"storage 0 should hold 64 bytes, found 32"):
        torch_pickle.read(claims)
    negative = edit_pickle(source, tmp_path / "negative.bin", b"K\x01\x85", b"J\xff\xff\xff\xff\x85")
    with pytest.raises(InputError, match="do not describe a tensor"):
        torch_pickle.read(negative)


def test_compressed_and_big_endian_files_are_refused(tmp_path: Path) -> None:
    source = save({"w": torch.zeros(1000)}, tmp_path / "m.bin", True)
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as after:
        for info in before.infolist():
            after.writestr(info.filename, before.read(info))
    with pytest.raises(InputError, match="compressed or encrypted"):
        torch_pickle.read(packed)
    described = pickle.dumps({}, 2)
    with pytest.raises(InputError, match="big-endian"):
        torch_pickle.read(zip_with(tmp_path / "be.bin", described, byteorder=b"big"))
    legacy = tmp_path / "legacy.bin"
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False, "protocol_version": 1001}, {}, [])
    legacy.write_bytes(b"".join(pickle.dumps(x, 2) for x in parts))
    with pytest.raises(InputError, match="big-endian"):
        torch_pickle.read(legacy)


@pytest.mark.parametrize("is_zip", [True, False])
def test_views_whose_bytes_are_not_their_values_are_refused(tmp_path: Path, is_zip: bool) -> None:
    """Torch stores what lies below a conjugated or negated view, and a bit that says so."""
    conjugated = torch.tensor([1 + 2j, 3 - 4j]).conj()
    for name, view in (("conj", conjugated), ("neg", conjugated.imag)):
        path = save({"w": view}, tmp_path / f"{name}.bin", is_zip)
        assert torch.equal(torch.load(path, weights_only=True)["w"], view)
        with pytest.raises(InputError, match=f"not stored as it is: its metadata says {name}"):
            torch_pickle.read(path)


def test_a_zip_that_lists_an_entry_twice_is_refused(tmp_path: Path) -> None:
    """Torch reads the first of them, Python's zipfile the last."""
    path = save({"w": torch.ones(4)}, tmp_path / "m.bin", True)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("m/data/0", bytes(16))
    with pytest.raises(InputError, match="lists an entry twice"):
        torch_pickle.read(path)


def test_legacy_views_of_a_storage(tmp_path: Path) -> None:
    """Files of torch < 0.4 name a view (key, offset, length) of the storage that is in the file."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            if isinstance(obj, str) and obj.startswith("view"):
                return ("storage", torch.FloatStorage, "7", "cpu", 10, (f"at {obj}", int(obj[4:]), 4))
            return None

    class View:
        def __init__(self, start: int) -> None:
            self.start = start

        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor, (f"view{self.start}", 1, (3,), (1,))

    data = torch.arange(10.0)
    buffer = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, buffer, 2)
    Pickler(buffer, 2).dump({"a": View(0), "b": View(6)})
    pickle.dump(["7"], buffer, 2)
    buffer.write(struct.pack("<q", 10) + data.numpy().tobytes())
    path = tmp_path / "old.bin"
    path.write_bytes(buffer.getvalue())
    same(torch_pickle.read(path), {"a": data[1:4], "b": data[7:10]})
    assert torch.equal(torch.load(path, weights_only=False)["b"], data[7:10])


@pytest.mark.parametrize(
    ("value", "expected"),
    [([1, 2], "a list"), (torch.ones(2), "one tensor"), ({"a": 1, "b": {}}, "keys a, b"), ({}, "(none)")],
)
def test_files_without_named_tensors(tmp_path: Path, value: object, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        torch_pickle.read(save(value, tmp_path / "m.pt", True))
    assert expected in caught.value.message


def test_missing_storage_and_zips_of_another_kind(tmp_path: Path) -> None:
    source = save({"w": torch.zeros(3)}, tmp_path / "m.bin", True)
    bare = tmp_path / "bare.bin"
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(bare, "w") as after:
        name = next(n for n in before.namelist() if n.endswith("data.pkl"))
        after.writestr(name, before.read(name))
    with pytest.raises(InputError, match="storage 0 is not in the file"):
        torch_pickle.read(bare)
    with zipfile.ZipFile(bare, "w") as after:
        after.writestr("notes.txt", "hello")
    with pytest.raises(InputError, match=r"0 data\.pkl, expected 1"):
        torch_pickle.read(bare)
