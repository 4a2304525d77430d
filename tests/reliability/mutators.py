"""Changes of files, by bytes and by the structure of their headers. All randomness comes from the given generator."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["mutate"]

_RAW = "\0raw\0"  # text of a value that json.dumps would not write
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**31 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e300, "", "x",
    "1", "é", "x" * 5000, "1" * 5000, "\x1b[31mred", "a\nhint: b", "../x", "/etc/passwd", "..", [], {}, [[]], [None],
    [1, "a"],    {"a": {}}, {"": None}, [0] * 50, _RAW + "NaN", _RAW + "Infinity", _RAW + "1e999", _RAW + "9" * 5000,
    _RAW + '"\\ud800"',
    _RAW + "[" * 3000 + "]" * 3000, _RAW + '{"a":' * 300 + "1" + "}" * 300,
)  # fmt: skip
_EXTREMES = (0, 1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutate(folder: Path, rng: random.Random, seeds: Path) -> str:
    """Change one file of `folder`, or a few; what was done."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        if not files:
            break
        path = rng.choice(files)
        if rng.random() < 0.06:
            done.append(f"{path.name}: {_swap(path, rng, seeds)}")
            continue
        changes = [_bytes, *_structural(path)]
        change = changes[0] if len(changes) == 1 or rng.random() < 0.3 else rng.choice(changes[1:])
        try:
            done.append(f"{path.name}: {change(path, rng)}")
        except Exception as error:  # noqa: BLE001 - what was changed before may be no such file any more
            done.append(f"{path.name}: {_bytes(path, rng)} (not {change.__name__}: {type(error).__name__})")
    return "; ".join(done)


def _structural(path: Path) -> list[Callable[[Path, random.Random], str]]:
    suffix = path.suffix
    if suffix in (".json", ".jsonl"):
        return [_json]
    if suffix in (".yaml", ".yml"):
        return [_yaml]
    if suffix == ".safetensors":
        return [_safetensors]
    if suffix == ".gguf":
        return [_gguf, _integers]
    if suffix == ".onnx":
        return [_onnx]
    if zipfile.is_zipfile(path):
        return [_zip]
    return [_integers]


def _bytes(path: Path, rng: random.Random) -> str:
    """Bits, pieces and the end of a file; headers more often than data."""
    data = bytearray(path.read_bytes())
    if not data:
        path.write_bytes(rng.randbytes(16))
        return "filled"
    reach = len(data) if rng.random() < 0.3 else min(len(data), 2048)
    at = rng.randrange(reach)
    kind = rng.choice(("bits", "bytes", "cut", "zeros", "gone", "twice", "text", "empty"))
    if kind == "bits":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        data[at : at + 8] = rng.randbytes(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        data[at : at + 64] = bytes(min(64, len(data) - at))
    elif kind == "gone":
        del data[at : at + rng.randint(1, 64)]
    elif kind == "twice":
        data[at:at] = data[at : at + 64]
    elif kind == "text":
        data[at : at + 4] = rng.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"\0" * 8, b"9" * 4400))
    else:
        data.clear()
    path.write_bytes(data)
    return f"{kind} at {at}"


def _integers(path: Path, rng: random.Random) -> str:
    """A number in the header becomes an extreme one."""
    data = bytearray(path.read_bytes())
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(max(1, min(len(data), 4096) - width))
    value = rng.choice(_EXTREMES) & (256**width - 1)
    data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
    path.write_bytes(data)
    return f"{width} bytes at {at} = {value}"


def _swap(path: Path, rng: random.Random, seeds: Path) -> str:
    kind = rng.choice(("file", "file", "file", "folder", "loop", "pipe", "gone", "link"))
    if kind == "file":
        other = rng.choice(sorted(p for p in seeds.rglob("*") if p.is_file()))
        shutil.copyfile(other, path)
        return f"is {other.relative_to(seeds)}"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "link":
        path.symlink_to("/nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    return f"is {kind}"


def changed_document(document: Any, rng: random.Random) -> tuple[Any, str]:
    """A JSON value with one member changed."""
    places: list[tuple[Any, Any]] = []
    level = [document]
    while level and len(places) < 20_000:
        value = level.pop()
        keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        places += [(value, key) for key in keys]
        level += [value[key] for key in keys if isinstance(value[key], dict | list)]
    if not places or rng.random() < 0.02:
        return rng.choice(_VALUES), "the whole"
    # The upper levels are as likely as all the rest: a vocabulary has thousands of members.
    near = places[: max(1, min(len(places), 40))]
    holder, key = rng.choice(near if rng.random() < 0.6 else places)
    kind = rng.choice(("value", "value", "value", "value", "gone", "name", "list", "copy"))
    if kind == "value":
        holder[key] = rng.choice(_VALUES)
    elif kind == "gone":
        del holder[key]
    elif kind == "name" and isinstance(holder, dict):
        holder[rng.choice(("", "x", "x" * 5000, "\x1b", f"{key}.0", "layers.99999999.x"))] = holder.pop(key)
    elif kind == "list":
        holder[key] = [holder[key]]
    else:
        other, other_key = rng.choice(places)
        holder[key] = json.loads(json.dumps(other.get(other_key) if isinstance(other, dict) else None, default=str))
    return document, f"{kind} of {str(key)[:30]}"


def _dumped(document: Any, rng: random.Random) -> str:
    text = json.dumps(document)
    mark = json.dumps(_RAW)[1:-1]
    while (at := text.find(f'"{mark}')) >= 0:
        end = at + 1
        while text[end] != '"' or text[end - 1] == "\\":
            end += 1
        text = text[:at] + json.loads(text[at : end + 1])[len(_RAW) :] + text[end + 1 :]
    if text.startswith("{") and rng.random() < 0.05:  # a key twice
        text = "{" + text[1:-1] + (", " if len(text) > 2 else "") + text[1:]
    return text


def _json(path: Path, rng: random.Random) -> str:
    document, words = changed_document(json.loads(path.read_text()), rng)
    path.write_text(_dumped(document, rng))
    return words


def _yaml(path: Path, rng: random.Random) -> str:
    import yaml

    document, words = changed_document(yaml.safe_load(path.read_text()), rng)
    path.write_text(_dumped(document, rng))  # JSON is YAML
    return words


def _safetensors(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    document, words = changed_document(json.loads(data[8 : 8 + n]), rng)
    header = _dumped(document, rng).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + n :])
    return f"header, {words}"


def _gguf(path: Path, rng: random.Random) -> str:
    """A header with other metadata, its numbers and types as the values are."""
    from llmkit.formats.gguf_header import encode_header, read_header

    found = read_header(path)
    metadata = dict(found.metadata)
    key = rng.choice(sorted(metadata))
    kind = rng.choice(("value", "value", "gone", "name", "other"))
    if kind == "value":
        metadata[key] = rng.choice(
            (0, 1, 2**31, 2**32 - 1, 3, 0.0, 1e30, float("nan"), float("inf"), "", "x", "x" * 5000, "\x1b[1m", True,
             [], [1], [0.5], ["a"], [True], [2**31 - 1] * 9, ["a"] * 259)
        )  # fmt: skip
    elif kind == "other":
        metadata[key] = metadata[rng.choice(sorted(metadata))]
    elif kind == "name":
        metadata[rng.choice(("x", "", "x" * 900, "llama.\x1b"))] = metadata.pop(key)
    else:
        del metadata[key]
    tensors = [(t.name, t.type, t.shape) for t in found.tensors]
    if rng.random() < 0.2:
        i = rng.randrange(len(tensors))
        name, of, shape = tensors[i]
        tensors[i] = rng.choice(((f"{name}x", of, shape), (name, of, (*shape, 1)), ("blk.99999999.x", of, shape)))
    data = path.read_bytes()
    start = min(t.offset for t in found.tensors)
    path.write_bytes(encode_header(metadata, tensors)[0] + data[start:])
    return f"{kind} of {key}"


def _zip(path: Path, rng: random.Random) -> str:
    """A torch file whose pickle was changed; checksums and sizes are right."""
    with zipfile.ZipFile(path) as old:
        entries = {i.filename: old.read(i) for i in old.infolist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    data = bytearray(entries[name])
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        data[at : at + 1] = rng.choice(
            (rng.randbytes(1), b"", bytes([rng.choice(b"()tl}]02RbQN")]), b"J\xff\xff\xff\x7f",
             b"\x8a\x08" + rng.choice(_EXTREMES).to_bytes(8, "little"))
        )  # fmt: skip
    entries[name] = bytes(data)
    if rng.random() < 0.1:
        del entries[rng.choice(sorted(entries))]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
        for key, value in entries.items():
            new.writestr(key, value)
    path.write_bytes(buffer.getvalue())
    return "pickle"


def _onnx(path: Path, rng: random.Random) -> str:
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    held, node = rng.choice(graph.initializer), rng.choice(graph.node)
    kind = rng.choice(("place", "dims", "dtype", "inputs", "outputs", "attribute", "metadata", "op", "name", "gone"))
    if kind == "place" and held.external_data:
        rng.choice(held.external_data).value = rng.choice(
            ("", "x", "-1", "9" * 30, "../x", "/etc/passwd", "1", "\0", "é")
        )
    elif kind == "dims":
        held.dims[:] = rng.choice(([], [-1], [2**40], [2**62, 2**62], [0], [1] * 20))
    elif kind == "dtype":
        held.data_type = rng.choice((0, 1, 7, 8, 9, 21, 22, 99, 2**31 - 1))
    elif kind == "inputs" and node.input:
        del node.input[rng.randrange(len(node.input)) :]
    elif kind == "outputs" and node.output:
        del node.output[:]
    elif kind == "attribute" and node.attribute:
        chosen = rng.choice(node.attribute)
        chosen.i, chosen.type = rng.choice((0, -1, 2**62)), rng.choice((0, 1, 2, 7))
    elif kind == "metadata" and model.metadata_props:
        entry = rng.choice(model.metadata_props)
        entry.value = rng.choice(("", "x", "[]", "{}", "1e999", "[" * 3000, "9" * 5000, "\x1b[1m", "null"))
    elif kind == "op":
        node.op_type = rng.choice(("", "MatMulNBits", "Reshape", "If", "DequantizeLinear"))
    elif kind == "name":
        rng.choice(graph.input).name = rng.choice(("", "x", "past_key_values.99999999.key"))
    else:
        del graph.node[rng.randrange(len(graph.node))]
    path.write_bytes(model.SerializeToString())
    return f"graph, {kind}"
