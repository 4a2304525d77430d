"""The message for a path without readable weights: what it is instead, and what to do about it."""

from __future__ import annotations

import os
import re
import shlex
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmkit.errors import InputError

_HEADS = (
    (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"), (b"GIF8", "a GIF image"), (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a zip archive, and none of torch's"), (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"), (b"\x93NUMPY", "a NumPy array"), (b"7z\xbc\xaf", "a 7z archive"),
    (b"\xfd7zXZ", "an xz archive"), (b"\x28\xb5\x2f\xfd", "a zstd archive"), (b"BZh", "a bzip2 archive"),
    (b"ggml", "GGML of before GGUF"), (b"ggjt", "GGML of before GGUF"), (b"tjgg", "GGML of before GGUF"),
    (b"lmgg", "GGML of before GGUF"), (b"fmgg", "GGML of before GGUF"),
    (b"GGUF", "a GGUF file of another name"), (b"algg", "an adapter of llama.cpp from before GGUF"),
)  # fmt: skip
_OTHER_WEIGHTS = (".msgpack", ".h5", ".npz", ".ckpt.index", ".distcp", ".ot", ".mlmodel", ".tflite")
# What programs that only run models make of them: how a file or folder is named, whose it is.
_RUNTIMES = (
    ("*.engine", "TensorRT"), ("*.plan", "TensorRT"), ("openvino_*.xml", "OpenVINO"), ("openvino_*.bin", "OpenVINO"),
    ("mlc-chat-config.json", "MLC"), ("params_shard_*.bin", "MLC"), ("*.mlpackage", "Core ML"),
    ("*.pte", "ExecuTorch"), ("*.llamafile", "llamafile"), ("*.nemo", "NeMo"), ("model_weights", "NeMo"),
    ("manifest.ocdbt", "Orbax"), ("*.pt2", "torch.export"), ("saved_model.pb", "TensorFlow"),
)  # fmt: skip
_FOLDER = "give the folder that holds config.json and the weight files"
_SOURCE = "give the model that it was made from"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_ARCHIVES = (".zip", ".tar", ".gz", ".7z", ".xz", ".zst", ".bz2")
_UNFINISHED = (".incomplete", ".crdownload", ".part", ".aria2", ".download", ".tmp")
_TABLES = (".parquet", ".arrow", ".jsonl", ".csv")
_PART = re.compile(r"(.*[.](?:safetensors|bin|pth|gguf))[.-](?:part|split)?[.-]?(?:\d+|[a-z]{2})")
_INNER = ("*/", "snapshots/*/", "models--*/snapshots/*/")  # the last two: the hub's cache
_MARKS = ("config.json", "adapter_config.json", "params.json", "model.safetensors", "pytorch_model.bin")
# What the ranks of a distributed training leave: a file in the folder or under it, whose it is, how weights come of it.
_RANKS = (
    ("*mp_rank_*_states.pt", "DeepSpeed", "python zero_to_fp32.py FOLDER OUT, the script beside it, writes weights"),
    ("model_optim_rng.pt", "Megatron", "convert it with the tools of the program that trained it"),
    ("*.distcp", "torch's distributed checkpoints (FSDP)",
     "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pt joins them"),
)  # fmt: skip
_STATE = ("optimizer.", "scheduler.", "scaler.", "rng_state", "training_args", "trainer_state")


def read_head(path: Path, nbytes: int = 64) -> bytes:
    """The first bytes of a file, which tell its format.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(nbytes)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def refuse_pointer(path: Path, head: bytes) -> None:
    """Refuse what git-lfs leaves in the place of a file that was not fetched.

    Raises:
        InputError: it is such a pointer.
    """
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-lfs pointer, not the file itself", hint="fetch the real file: git lfs pull")


def no_weight_file(path: Path, head: bytes) -> InputError:
    """The error for a file that is no weight file, by its first bytes."""
    named = next((words for start, words in _HEADS if head.startswith(start)), None)
    is_zeros = bool(head) and not any(head)
    if named is None and is_zeros:
        named = "zeros where its header should be"
    elif named is None and head and _is_text(head):
        named = "text, not weights"
    if not head:
        named = "empty"
    hint = "give a model folder, or a file of weights"
    if (runtime := _runtime(path, head)) is not None:
        return InputError(f"{path} is {runtime}'s, neither safetensors nor a torch pickle", hint=_SOURCE)
    if named is not None and "archive" in named:
        hint = "unpack it, and give the folder"
    elif head.startswith(b"GGUF"):
        hint = f"rename it: {path.with_suffix('.gguf').name}"
    elif is_zeros:
        hint = "it is damaged: fetch it again; of an XOR release: llmkit delta xor BASE RELEASE -o OUT"
    elif path.name.endswith(".index.json"):
        hint = f"it is an index: give the folder, {shlex.quote(str(path.parent))}, that holds the files it names"
    elif path.suffix in WEIGHT_SUFFIXES:
        hint = "it is another program's, or damaged: fetch it again"
    elif (path.parent / "config.json").is_file():  # a file beside the weights: the folder is what opens
        hint = f"give the folder: {path.parent}"
    description = f"is {named}" if named else f"begins with {head[:8]!r}"
    return InputError(f"{path} {description}: neither safetensors nor a torch pickle", hint=hint)


def _is_text(head: bytes) -> bool:
    """Whether a file begins with text in UTF-8; a character may be cut at the end."""
    try:
        getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(b in b"\t\n\r\x1b" or b >= 32 for b in head)


def _runtime(path: Path, head: bytes) -> str | None:
    """The program that made a file, or what a folder has, for itself alone; None for none that is known."""
    if (
        path.is_file() and b"Spec\0" in head
    ):  # the name of a class at the file's beginning: TransformerSpec, WhisperSpec
        return "CTranslate2"
    found = (w for glob, w in _RUNTIMES if path.match(glob) or (path.is_dir() and any(path.glob(glob))))
    return next(found, None)


def no_weights(folder: Path) -> InputError:
    """The error for a folder without weight files, by what lies in it."""
    words, hint = next(_held_instead(folder))
    return InputError(f"{folder} holds no weights{words}", hint=hint)


def _held_instead(folder: Path) -> Iterator[tuple[str, str]]:
    """What a folder holds in place of weights, the most telling first: words that follow, and the hint."""
    names = sorted(p.name for p in folder.iterdir())
    if not names:
        yield ": it is empty", _FOLDER
    for glob, owner, way in _RANKS:
        if any(any(folder.glob(at + glob)) for at in ("", "*/", "*/*/")):
            way = way.replace("FOLDER", shlex.quote(str(folder)))
            yield f" in one piece: it is a training run's state by ranks, of {owner}", way
    found = ": found no model.safetensors, pytorch_model.bin or index of shards"
    if "model_index.json" in names:
        yield f"{found}; it is a pipeline of diffusers, whose models lie in folders of their own", _FOLDER
    if (runtime := _runtime(folder, b"")) is not None:
        yield f"{found}; it is {runtime}'s, which is not read", _SOURCE
    for graph in (p.relative_to(folder) for at in ("*.onnx", "onnx/*.onnx") for p in sorted(folder.glob(at))):
        hint = "give it that name in a folder with the tokenizer and config.json, its data beside it"
        yield f"{found}; {graph} is a graph, which is read as model.onnx beside config.json", hint
    for name in (n for n in names if n.endswith(_OTHER_WEIGHTS)):
        hint = "save the model with transformers as safetensors: model.save_pretrained"
        yield f"{found}; {name} is of a format that is not read", hint
    for name in (n for n in names if n.endswith(_UNFINISHED)):
        yield f"{found}; {name} is an unfinished download", "fetch it again, whole"
    pieces = sorted((m for m in map(_PART.fullmatch, names) if m), key=lambda m: (len(m[0]), m[0]))
    if len(pieces) > 1:
        *parts, whole = (shlex.quote(str(folder / name)) for name in [*(m[0] for m in pieces), pieces[0][1]])
        yield f"{found}; {pieces[0][0]} is a piece of a file that was split", f"cat {' '.join(parts)} > {whole}"
    inner = sorted(p for at in _INNER for p in folder.glob(at) if any((p / n).is_file() for n in _MARKS))
    if inner:
        yield f"{found}; models may lie in its folders, such as {inner[-1]}", f"give {shlex.quote(str(inner[-1]))}"
    if any(n.endswith(_ARCHIVES) for n in names):
        yield found, "unpack the archive in it"
    if "adapter_config.json" in names:
        yield f"{found}; it holds the config of an adapter", "fetch the adapter's weights: adapter_model.safetensors"
    if any(n.startswith("tokenizer") or n == "vocab.json" for n in names):
        yield f"{found}; it holds a tokenizer", _FOLDER
    if any(n.startswith(_STATE) for n in names):
        yield f"{found}; it holds the state of a training run", _FOLDER
    if any(p.suffix in _TABLES for at in ("*", "*/*") for p in folder.glob(at)):
        yield f"{found}; it holds a dataset", _FOLDER
    if "config.json" in names:
        yield found, "config.json is there: fetch the weight files that belong to it"
    yield found, _FOLDER


def kind_of_entry(path: Path) -> str:
    """What stands at a path where a file is looked for, in words; empty where there is nothing, or a file."""
    if path.is_file() or not os.path.lexists(path):
        return ""
    if path.is_dir():
        return "a folder, no file"
    try:
        path.stat()
    except FileNotFoundError:
        return f"a symbolic link to {os.readlink(path)}, which is not there"
    except OSError as error:
        return f"a symbolic link that leads nowhere ({error.strerror})"
    return "no regular file"


def no_file(path: Path) -> str:
    """Why there is no file at a path: nothing is there, or something else."""
    kind = kind_of_entry(path)
    return f"{path} is {kind}" if kind else f"{path}: no such file"


def refuse_no_files(folder: Path, names: Iterable[str]) -> None:
    """Refuse what has a name that is read and is no file: a link to nowhere, a pipe; it would pass for absent.

    Raises:
        InputError: naming the first.
    """
    for name in names:
        if kind := kind_of_entry(folder / name):
            raise InputError(
                f"{folder / name} is {kind}", hint="copy the file from the model's source again, or remove it"
            )
