"""`info`: what a vocabulary holds, and how it cuts a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.hub import resolve_path
from llmkit.errors import InputError, LlmkitError, RequirementError
from llmkit.tokenization.agreement import embedding_rows
from llmkit.tokenization.bundle import TokenizerFiles, read_tokenizer, tokenizer_contents
from llmkit.tokenization.byte_level import from_bytes, text_of, to_bytes
from llmkit.tokenization.scripts import script_of
from llmkit.tokenization.sentencepiece_model import SPACE
from llmkit.transforms.vocab.trim import OnProgress, TrackedTexts, read_corpus


def info(
    target: Checkpoint | TokenizerFiles,
    *,
    text: str | Path | None = None,
    against: TokenizerFiles | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Pieces by type and script; with a text, how many tokens it takes.

    Args:
        target: a checkpoint, or tokenizer files alone (`open_tokenizer`).
        text: a UTF-8 text file, encoded line by line.
        against: a second vocabulary, for what is new and what the same text takes there.
        on_progress: called with the characters of the text that are cut, of how many; from 0 on for each vocabulary.

    Raises:
        InputError: the text cannot be read.
        RequirementError: no tokenizer, or a text given for one that cannot encode here.
    """
    tokenizer = (
        target if isinstance(target, TokenizerFiles) else read_tokenizer(target.label, target.files, target.config)
    )
    description: dict[str, Any] = {
        "label": tokenizer.label,
        "kind": tokenizer.kind,
        "n_tokens": tokenizer.n_tokens or len(tokenizer.ranks or ()),
        "n_added": sum(i >= tokenizer.n_model for i in tokenizer.added),
        "rows": embedding_rows(target) if isinstance(target, Checkpoint) else None,
        **_pieces(tokenizer),
    }
    lines = read_corpus(Path(text)) if text is not None else None
    if lines is not None:
        description["text"] = _measured(tokenizer, lines, on_progress)
    if against is not None:
        mine, theirs = set(tokenizer.known), set(against.known)
        other: dict[str, Any] = {
            "label": against.label, "kind": against.kind, "n_tokens": against.n_tokens,
            "n_shared": len(mine & theirs), "n_only_here": len(mine - theirs), "n_only_there": len(theirs - mine),
        }  # fmt: skip
        if lines is not None:
            other["text"] = _measured(against, lines, on_progress)
            other["tokens_ratio"] = other["text"]["n_tokens"] / max(description["text"]["n_tokens"], 1)
        description["against"] = other
    return description


def open_tokenizer(path: str | Path) -> TokenizerFiles:
    """The tokenizer of a model (a folder, or a GGUF file), of a folder with tokenizer files only, or of one such file.

    Raises:
        InputError: nothing there, or no tokenizer.
    """
    where = resolve_path(path)
    files = tokenizer_contents(where)
    tokenizer = read_tokenizer(where.name, files)
    if tokenizer.sp is None and tokenizer.fast is None and tokenizer.ranks is None:
        raise InputError(
            f"{where} has no tokenizer: expected tokenizer.json, a SentencePiece model or a tiktoken file",
            hint="give the folder that holds tokenizer.json, or the file itself",
        )
    return tokenizer


def _pieces(tokenizer: TokenizerFiles) -> dict[str, Any]:
    types: Counter[str] = Counter()
    scripts: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    for text, kind in _texts(tokenizer):
        types[kind] += 1
        if kind == "normal":
            script = script_of(text) if text is not None else "part of a character"
            scripts[script] += 1
            lengths[script] += len(text.strip(" ")) if text is not None else 0
    ordered = sorted(scripts.items(), key=lambda item: (-item[1], item[0]))
    return {
        "types": dict(sorted(types.items())),
        "scripts": {name: {"n": n, "mean_chars": round(lengths[name] / n, 2)} for name, n in ordered},
    }


def _texts(tokenizer: TokenizerFiles) -> Iterator[tuple[str | None, str]]:
    """Every token as text (None: not whole characters) and its type."""
    added = {t["content"] for t in tokenizer.added.values()}
    if tokenizer.sp is not None:
        for piece in tokenizer.sp.pieces:
            yield piece.text.replace(SPACE, " "), piece.kind.name.lower().replace("_", " ")
        yield from ((t["content"], "added") for i, t in tokenizer.added.items() if i >= tokenizer.n_model)
        return
    if tokenizer.fast is None:
        for data in tokenizer.ranks or ():
            yield text_of(data), "byte" if len(data) == 1 else "normal"
        return
    is_bytes = tokenizer.kind == "byte_level"
    single = {from_bytes(bytes([b])) for b in range(256)} if is_bytes else {f"<0x{b:02X}>" for b in range(256)}
    for token in tokenizer.fast.vocab:
        if token in added:
            continue
        spelt = to_bytes(token) if is_bytes else None
        text = text_of(spelt) if spelt is not None else token.replace(SPACE, " ")
        yield text, "byte" if token in single else "normal"
    yield from ((content, "added") for content in sorted(added))


def _measured(tokenizer: TokenizerFiles, lines: list[str], on_progress: OnProgress | None) -> dict[str, Any]:
    try:
        encode = tokenizer.encoder()
    except LlmkitError as error:
        raise RequirementError(f"{tokenizer.label}: a text cannot be encoded: {error.message}") from error
    names = {i: name for name, i in tokenizer.known.items()}
    n_chars = n_tokens = n_bytes = n_byte_tokens = n_lines = 0
    tracked = TrackedTexts(sum(len(line) + 1 for line in lines), on_progress)
    for line in tracked.over(lines):
        if not line:
            continue
        ids = encode(line)
        n_lines += 1
        n_chars += len(line)
        n_bytes += len(line.encode())
        n_tokens += len(ids)
        n_byte_tokens += sum(_is_byte(names.get(i, "")) for i in ids)
    return {
        "n_lines": n_lines,
        "n_chars": n_chars,
        "n_bytes": n_bytes,
        "n_tokens": n_tokens,
        "chars_per_token": round(n_chars / max(n_tokens, 1), 4),
        "tokens_per_char": round(n_tokens / max(n_chars, 1), 4),
        "byte_fallback_share": round(n_byte_tokens / max(n_tokens, 1), 4),
    }


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x")
