"""The .bin files of llama2.c: a header and raw tensors in a fixed order, versions 0 and 1 in float32, 2 in int8.

v0  7 int32 (dim, hidden, layers, heads, kv heads, vocab, seq_len; a negative vocab: the head is stored), then float32:
    tok_emb; for all layers att_norm; wq; wk; wv; wo; ffn_norm; w1; w2; w3; final norm; cos and sin tables; [output].
v1  "ak42", int32 version, the 7, a byte: the head is shared; zeros up to byte 256. Then all norms, and the rest of v0's
    order without tables.
v2  the same header with an int32 group size; norms in float32, then each matrix as int8 and its float32 scales.
Rows of q and k are in Meta's order. The epsilon of the norms is 1e-5 and theta 10000: the format has no place for them.

Source: karpathy/llama2.c, export.py and run.c.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.architecture import registry
from llmkit.architecture.model import Model
from llmkit.errors import InputError, RequirementError
from llmkit.formats.stream import StreamFile
from llmkit.layouts import meta
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.described import decoder_config
from llmkit.layouts.layout import Layout, OpenedLayout, WrittenLayout, same_sizes, to_hf, weights_for
from llmkit.quantization.codecs.q8 import CODEC
from llmkit.quantization.matrix import Grid
from llmkit.quantization.method import Task, quantized
from llmkit.quantization.methods.rtn import NARROW
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.rearrange import reshape
from llmkit.tensors.siblings import siblings
from llmkit.tensors.source import SourceFile
from llmkit.tensors.spec import DType, TensorSpec

NAME = "llama2c"
FILE = "model.bin"
_MAGIC = b"24ka"  # 0x616b3432, little-endian
_HEADER_NBYTES = 256
_EPS, _THETA = 1e-5, 10000.0
_GROUP_SIZE = 64  # of int8, or what divides the width
_MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
_FFN = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


@dataclass(frozen=True)
class _Header:
    version: int
    dim: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    seq_len: int
    is_tied: bool
    group_size: int = 0

    @property
    def start(self) -> int:
        """Where the tensors begin."""
        return 28 if self.version == 0 else _HEADER_NBYTES

    def config(self) -> dict[str, Any]:
        """The same as a config.json."""
        return decoder_config(
            hidden=self.dim, ffn=self.ffn, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads,
            vocab=self.vocab, eps=_EPS, theta=_THETA, context=self.seq_len, is_tied=self.is_tied, dtype=DType.F32,
        )  # fmt: skip

    def is_plausible(self) -> bool:
        """Whether these can be the sizes of a model."""
        sizes = (self.dim, self.ffn, self.layers, self.heads, self.kv_heads, self.vocab, self.seq_len)
        return (
            all(0 < n < 2**24 for n in sizes) and self.layers < 1000 and self.dim % self.heads == 0
            and self.heads % self.kv_heads == 0 and self.heads <= 1024 and self.seq_len < 2**22 and self.dim >= 2
        )  # fmt: skip

    def packed(self) -> bytes:
        sizes = (self.dim, self.ffn, self.layers, self.heads, self.kv_heads)
        if self.version == 0:
            return struct.pack("<7i", *sizes, self.vocab if self.is_tied else -self.vocab, self.seq_len)
        head = _MAGIC + struct.pack("<8iB", self.version, *sizes, self.vocab, self.seq_len, self.is_tied)
        if self.version == 2:
            head += struct.pack("<i", self.group_size)
        return head.ljust(_HEADER_NBYTES, b"\0")


def _parsed(head: bytes, where: str) -> _Header | None:
    if head[:4] == _MAGIC and len(head) >= 41:
        version, dim, ffn, layers, heads, kv_heads, vocab, seq_len, shared = struct.unpack_from("<8iB", head, 4)
        if version not in (1, 2):
            raise InputError(f"{where}: llama2.c version {version}; versions 0, 1 and 2 are read")
        size = struct.unpack_from("<i", head, 37)[0] if version == 2 else 0
        header = _Header(version, dim, ffn, layers, heads, kv_heads, vocab, seq_len, bool(shared), size)
        if not header.is_plausible() or (version == 2 and not 0 < size <= 2**20):
            sizes = ", ".join(f"{name} {value}" for name, value in vars(header).items())
            raise InputError(f"{where}: the header is damaged: {sizes}", hint="download or export it again")
        return header
    if len(head) < 28:
        return None
    dim, ffn, layers, heads, kv_heads, vocab, seq_len = struct.unpack_from("<7i", head)
    header = _Header(0, dim, ffn, layers, heads, kv_heads, abs(vocab), seq_len, vocab > 0)
    return header if header.is_plausible() else None


def find(candidate: Candidate) -> OpenedLayout | None:
    """What a .bin of llama2.c holds; None for anything else.

    Raises:
        InputError: the file is truncated or longer than its header says, or the header is damaged.
    """
    path = candidate.main
    if path is None or path.suffix != ".bin":
        return None
    header = _parsed(candidate.head, str(path))
    if header is None:
        return None
    tensors = _tensors(path, header)
    config = header.config()
    notes = [f"read from llama2.c's layout, version {header.version}"]
    if header.version == 2:
        notes.append(f"int8 in groups of {header.group_size}, dequantized")
    if "config.json" in candidate.names:
        beside = candidate.json("config.json")
        same_sizes(str(path), config, beside)
        config = {**beside, "tie_word_embeddings": header.is_tied}
    pieces = candidate.folder / "tokenizer.bin" if "tokenizer.bin" in candidate.names else None
    view = to_hf(str(path), tensors, config, meta.SPELLING)
    return OpenedLayout(NAME, view, config, own=(FILE,), scored_pieces=pieces, notes=tuple(notes))


def _order(h: _Header) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names (Meta's) and shapes in file order; the tables of version 0 have names of their own."""
    hidden, kv = h.dim, h.kv_heads * (h.dim // h.heads)
    shapes: dict[str, tuple[int, ...]] = dict(
        zip(_MATRICES, ((hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)), strict=True)
    )
    shapes |= {"feed_forward.w1": (h.ffn, hidden), "feed_forward.w2": (hidden, h.ffn)}
    shapes |= {"feed_forward.w3": (h.ffn, hidden), "attention_norm": (hidden,), "ffn_norm": (hidden,)}

    def of_all(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((f"layers.{i}.{name}.weight", shapes[name]) for i in range(h.layers))

    if h.version == 0:
        yield "tok_embeddings.weight", (h.vocab, hidden)
        for name in ("attention_norm", *_MATRICES, "ffn_norm", *_FFN):
            yield from of_all(name)
        yield "norm.weight", (hidden,)
        yield from ((f"rope.{table}", (h.seq_len, hidden // h.heads // 2)) for table in ("cos", "sin"))
    else:
        yield from of_all("attention_norm")
        yield from of_all("ffn_norm")
        yield "norm.weight", (hidden,)
        yield "tok_embeddings.weight", (h.vocab, hidden)
        for name in (*_MATRICES, *_FFN):
            yield from of_all(name)
    if not h.is_tied:
        yield "output.weight", (h.vocab, hidden)


def _tensors(path: Path, header: _Header) -> dict[str, Lazy]:
    source = SourceFile(path)
    tensors: dict[str, Lazy] = {}
    position = header.start
    for name, shape in _order(header):
        spec = TensorSpec(DType.F32, shape)
        if header.version == 2 and len(shape) == 2:
            if spec.numel % header.group_size:
                raise InputError(f"{path}: {name} does not divide into groups of {header.group_size}: a damaged header")
            rows, columns = _whole_groups(shape, header.group_size)
            values = TensorSpec(DType.I8, (rows, columns))
            scales = TensorSpec(DType.F32, (rows, columns // header.group_size))
            spans = {"int8": (values, position), "scale": (scales, position + values.nbytes)}
            parts = {end: Read(f"{name}/{end}", part, source, at).output() for end, (part, at) in spans.items()}
            tensors[name] = reshape(CODEC.read(parts, {}, None).dequantized(), shape)
            position += values.nbytes + scales.nbytes
        else:
            if not name.startswith("rope."):
                tensors[name] = Read(name, spec, source, position).output()
            position += spec.nbytes
    if position != source.nbytes:
        raise InputError(
            f"{path}: its header (llama2.c version {header.version}, dim {header.dim}, {header.layers} layers) "
            f"needs {position} bytes, the file has {source.nbytes}",
            hint="download or export it again"
            if position > source.nbytes
            else "give a file that llama2.c's export.py wrote, or that `llmkit convert MODEL --to llama2c -o OUT` did",
        )
    return tensors


def write(tensors: Mapping[str, Lazy], config: Mapping[str, Any], file_version: int = 1) -> WrittenLayout:
    """A checkpoint as llama2.c exports it.

    Args:
        file_version: 0 (the first, with tables), 1, or 2 (int8).

    Raises:
        RequirementError: a model with another epsilon or theta, or that llama2.c cannot run for another reason.
        InputError: no such version.
    """
    version = file_version
    if version not in (0, 1, 2):
        raise InputError(f"--file-version {version}: llama2.c has versions 0, 1 and 2", hint="--file-version 1")
    d = registry.require_model(config, f"--to {NAME}").dims
    header = _Header(version, d.hidden, d.ffn, d.layers, d.heads, d.kv_heads, d.vocab, d.context or 2048, False)
    model, weights = weights_for(NAME, tensors, config, header.config(), meta.SPELLING)
    header = replace(header, is_tied=model.is_tied, group_size=math.gcd(_GROUP_SIZE, model.dims.hidden))
    named = {model.spelled(meta.SPELLING.names).table.name(slot): lazy for slot, lazy in weights.items()}
    parts: list[bytes | str] = [header.packed()]
    written: dict[str, Lazy] = {}
    for name, shape in _order(header):
        if name.startswith("rope."):
            parts.append(_table(model, header, math.cos if name.endswith("cos") else math.sin))
        elif version == 2 and len(shape) == 2:
            weight = reshape(named[name], _whole_groups(shape, header.group_size))
            matrix = quantized(Task(weight, NARROW, Grid(8, header.group_size), DType.F32, name))
            pieces = siblings({f"{name}/{end}": part for end, part in CODEC.write(matrix).items()})
            written |= pieces
            parts += pieces
        else:
            written[name] = named[name].cast(DType.F32)
            parts.append(name)
    if any(lazy.dtype not in (DType.F32, DType.F16, DType.BF16) for lazy in named.values()):
        raise RequirementError("--to llama2c writes float32; the weights are no floats of 16 or 32 bits")
    notes = [f"llama2.c version {version}"]
    return WrittenLayout(written, StreamFile(FILE, parts), notes=tuple(notes))


def _whole_groups(shape: tuple[int, ...], group_size: int) -> tuple[int, int]:
    """A shape of the same elements whose rows are whole groups: a group a row, where groups cross the rows."""
    rows, columns = shape
    return (rows, columns) if columns % group_size == 0 else (rows * columns // group_size, group_size)


def _table(model: Model, header: _Header, function: Any) -> bytes:
    """Cos or sin of position times frequency, [seq_len, head_dim / 2] float32 (readers recompute it)."""
    half = model.dims.head_dim // 2
    turns = [_THETA ** (-j / half) for j in range(half)]
    return array("f", [function(t * turn) for t in range(header.seq_len) for turn in turns]).tobytes()


LAYOUT = Layout(
    NAME,
    find,
    write,
    "llama2.c's model.bin and tokenizer.bin",
    ("file_version",),
    has_own_format=True,
    pieces="tokenizer.bin",
)
