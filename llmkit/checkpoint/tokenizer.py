"""A checkpoint's tokenizer, from the files it carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmkit.architecture.tokenizers import TokenizerKind, published_tokenizers
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.templates import with_named_templates
from llmkit.errors import InputError, LlmkitError, in_a_line, listing
from llmkit.formats.json_text import read_object
from llmkit.formats.tokenizer_files import TOKENIZER_FILES, FileKind, names_of
from llmkit.tokenization.checked import read_tokenizer_json, require_bounded, template_text
from llmkit.tokenization.panics import PanicError, guard, without_panic
from llmkit.tokenization.pieces_tokenizer import tokenizer_of_pieces
from llmkit.tokenization.published import build_tokenizer, choose_kind, named_classes

_PLAIN_NAMES = names_of(FileKind.FAST)


def load_tokenizer(ckpt: Checkpoint) -> Any:
    """The tokenizer of a checkpoint; code that a folder carries is never run.

    It is transformers' where transformers knows the class. The tokenizers that were published as remote code are made
    from their files (`FileTokenizer`, the same interface as far as it is used here).

    Raises:
        InputError: no tokenizer files, files that cannot be read, or a class of remote code that is not known.
    """
    files = ckpt.tokenizer_files or _files_beside(ckpt)
    if not files:
        raise InputError(
            f"{ckpt.label}: no tokenizer files",
            hint="copy tokenizer.json (or tokenizer.model) and tokenizer_config.json into the model's folder",
        )
    for content in files.values():
        content.require_small()
    settings = tokenizer_settings(files, ckpt.label)
    tokenizer = _from_pieces(files, settings, ckpt.label)
    if tokenizer is not None:
        return tokenizer
    if not any(name in files for name in _PLAIN_NAMES):
        tokenizer = _from_published_file(ckpt, files, settings)
        if tokenizer is not None:
            return tokenizer
    is_plain_folder = ckpt.origin is not None and ckpt.origin.is_dir() and ckpt.layout == "hf"
    if ckpt.origin is not None and is_plain_folder and "20B_tokenizer.json" not in files:
        return _tried(_from_folder(ckpt.origin, ckpt.label, settings), ckpt.label)
    with TemporaryDirectory(prefix="llmkit-tokenizer-") as folder:
        for name, content in files.items():
            plain = "tokenizer.json" if name in _PLAIN_NAMES and "tokenizer.json" not in files else name
            (Path(folder) / plain).write_bytes(content.read())
        (Path(folder) / "config.json").write_text(json.dumps(dict(ckpt.config)), encoding="utf-8")
        return _tried(_from_folder(Path(folder), ckpt.label, settings), ckpt.label)


def has_tokenizer(ckpt: Checkpoint) -> bool:
    """Whether `load_tokenizer` finds files; they are not looked into."""
    return bool(ckpt.tokenizer_files or _files_beside(ckpt))


def _files_beside(ckpt: Checkpoint) -> dict[str, FileContent]:
    """The tokenizer files in the folder of a checkpoint that is a single file."""
    if ckpt.origin is None or not ckpt.origin.is_file():
        return {}
    paths = [ckpt.origin.parent / name for name in TOKENIZER_FILES]
    return with_named_templates({p.name: FileContent(path=p) for p in paths if p.is_file()}, ckpt.origin.parent)


def tokenizer_settings(files: Mapping[str, FileContent], label: str) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template that may lie in a file of its own.

    Raises:
        InputError: malformed files.
    """
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in files:
        name = "tokenizer_config.json"
        settings = read_tokenizer_json(name, files[name].read(), f"{label}: {name}")
    if "chat_template.jinja" in files:
        name = "chat_template.jinja"
        settings["chat_template"] = template_text(files[name].read(), f"{label}: {name}")
    return settings


def published_kind(ckpt: Checkpoint, files: Mapping[str, FileContent] | None = None) -> TokenizerKind | None:
    """The kind of a tokenizer that was published as remote code, or None when it is none of them.

    Args:
        ckpt: the checkpoint.
        files: its tokenizer files where they are not the checkpoint's own.
    """
    files = ckpt.tokenizer_files if files is None else files
    default = _own_kind(ckpt)
    names = {kind.file for kind in (*published_tokenizers().values(), *([default] if default else []))}
    data = {name: content.read() for name, content in files.items() if name in names}
    return choose_kind(tokenizer_settings(files, ckpt.label), data, default)


def _own_kind(ckpt: Checkpoint) -> TokenizerKind | None:
    try:
        architecture = ckpt.architecture
    except LlmkitError:
        return None  # two plugins that clash: the files may tell as much
    return architecture.tokenizer if architecture is not None else None


def _from_published_file(ckpt: Checkpoint, files: Mapping[str, FileContent], settings: Mapping[str, Any]) -> Any:
    """The tokenizer of a kind that was published as remote code, or None when it is none of them."""
    kind = published_kind(ckpt, files)
    if kind is None:
        return None
    data = {name: files[name].read() for name in (kind.file, "added_tokens.json") if name in files}
    return build_tokenizer(kind, data, settings, ckpt.config, ckpt.label)


def _from_pieces(files: Mapping[str, FileContent], settings: Mapping[str, Any], label: str) -> Any:
    """The tokenizer of a GGUF file's scored pieces, or None where SentencePiece cannot read them, or there are none.

    There tokenizer.model and tokenizer.json are both made from the file; the former is exact.
    """
    pieces = files.get("tokenizer.model")
    if pieces is None or pieces.make is None:
        return None
    try:
        return tokenizer_of_pieces(pieces.read(), settings, label)
    except InputError:
        return None  # two pieces of one text, an empty one: tokenizer.json bears them


def _from_folder(folder: Path, label: str, settings: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        require_bounded(read_object(folder / "tokenizer.json"), f"{label}: tokenizer.json")
    try:
        with without_panic():
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        if settings.get("auto_map") or (folder / "tokenizer.json").is_file():
            # a class that is remote code, or none at all: tokenizer.json needs no class
            if (folder / "tokenizer.json").is_file():
                return _fast(PreTrainedTokenizerFast, folder, label)
            raise _unknown_class(settings, label) from error
        raise _unreadable(error, label) from error


def _fast(fast_class: Any, folder: Path, label: str) -> Any:
    try:
        with without_panic():
            return fast_class.from_pretrained(str(folder))
    except Exception as error:
        raise _unreadable(error, label) from error


def _tried(tokenizer: Any, label: str) -> Any:
    """A tokenizer that gets through a text: a step with impossible settings panics at any, not when it is read."""
    try:
        guard(tokenizer).decode(tokenizer.encode("a b"))
    except PanicError as error:
        raise _unreadable(error, label) from error
    except Exception as error:
        if type(error) is not Exception:  # which the library raises where a text has what a vocabulary lacks
            raise
    return tokenizer


def _unreadable(error: Exception, label: str) -> InputError:
    reason = in_a_line(error) or "no reason given"
    return InputError(
        f"{label}: transformers cannot read its tokenizer ({type(error).__name__}: {reason})",
        hint="copy tokenizer.json and tokenizer_config.json from the model's source, or what it has instead",
    )


def _unknown_class(settings: Mapping[str, Any], label: str) -> InputError:
    names = named_classes(settings)
    wanted = sorted({kind.file for kind in published_tokenizers().values() if set(names) & set(kind.classes)})
    needed = f"{' or '.join(wanted)} as it was published with the model" if wanted else "tokenizer.json"
    return InputError(
        f"{label}: its tokenizer is remote code ({listing(names)}), which is never run",
        hint=f"copy {needed} into the model's folder",
    )


def end_tokens(ckpt: Checkpoint) -> list[int]:
    """The ids that end a generated text, as generation_config.json (else config.json, its text's part) names them."""
    named = ckpt.generation_config.get("eos_token_id", ckpt.config.get("eos_token_id"))
    inner = ckpt.config.get("text_config")
    if named is None and "eos_token_id" not in ckpt.generation_config and isinstance(inner, Mapping):
        named = inner.get("eos_token_id")
    return [int(i) for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)]
