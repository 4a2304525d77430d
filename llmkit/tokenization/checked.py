"""The JSON files of a tokenizer, read so that every key that is used later has the type that its reader expects.

    tokenizer.json         model.vocab (token -> id, or [token, score] pairs), merges, added_tokens, the steps
    tokenizer_config.json  added_tokens_decoder, the special tokens, model_max_length
    added_tokens.json, vocab.json                                              token -> id

Ids are whole numbers below ten million, some forty times the largest vocabulary that was published: lists are made of
as many entries as the largest id says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from llmkit.errors import InputError
from llmkit.formats.json_text import parse_object
from llmkit.formats.tokenizer_files import FileKind, names_of
from llmkit.tensors.source import AGAIN

MOST_IDS = 10_000_000
_MOST_PADDING = 2**20  # tokens: the library makes all of them
_MOST_GROWTH = 1000  # thirty replacements of a letter by two make gigabytes of it
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Of tokenizer.json: steps, each an object or null; within them, lists of steps.
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_STEP_LISTS = ("normalizers", "pretokenizers", "processors", "decoders", "single", "pair")


def read_tokenizer_json(name: str, data: bytes, where: str) -> dict[str, Any]:
    """The object in one of the files.

    Args:
        name: the file's; one that is not known is only parsed.
        data: its bytes.
        where: names it in errors.

    Raises:
        InputError: no JSON object, or a value of another type than the file has there.
    """
    document = parse_object(data, where)
    check = _CHECKS.get(name)
    if check is not None:
        check(document, where)
    return document


def is_id(value: Any) -> bool:
    """Whether a value can be the id of a token."""
    return type(value) is int and 0 <= value < MOST_IDS


def _expect(is_right: bool, where: str, what: str, value: Any, expected: str) -> None:
    if not is_right:
        raise InputError(
            f"{where}: {what} is {_short(value)}, expected {expected}", hint="copy the file from its source again"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text[:40]) if isinstance(value, str) else text[:40]


def _ids(document: Mapping[str, Any], where: str) -> None:
    for token, i in document.items():
        if not is_id(i):
            _expect(False, where, f"the id of token {_short(token)}", i, f"a whole number below {MOST_IDS}")


def _tokenizer(document: Mapping[str, Any], where: str) -> None:
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict | list):
        raise InputError(
            f"{where}: no tokenizer.json (it has no model with a vocabulary)", hint="give the tokenizer.json of a model"
        )
    if isinstance(vocab, dict):
        _ids(vocab, where)
    else:
        for row in vocab:
            is_pair = isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and _is_number(row[1])
            _expect(is_pair, where, "a piece of the vocabulary", row, "[text, score]")
    merges = model.get("merges")
    _expect(merges is None or isinstance(merges, list), where, "model.merges", merges, "a list")
    for merge in merges or ():
        parts = merge.split(" ", 1) if isinstance(merge, str) else merge
        is_pair = isinstance(parts, list) and len(parts) == 2 and all(isinstance(p, str) for p in parts)
        _expect(is_pair, where, "a merge", merge, "two symbols")
    _expect(isinstance(model.get("unk_token"), str | None), where, "model.unk_token", model.get("unk_token"), "text")
    unk = model.get("unk_id")
    _expect(unk is None or (is_id(unk) and unk < len(vocab)), where, "model.unk_id", unk, "an id of the vocabulary")
    added = document.get("added_tokens")
    _expect(added is None or isinstance(added, list), where, "added_tokens", added, "a list")
    for token in added or ():
        _expect(isinstance(token, dict), where, "an added token", token, "an object")
        _expect(is_id(token.get("id")), where, "the id of an added token", token.get("id"), "a whole number")
        content = token.get("content")
        _expect(isinstance(content, str), where, "the content of an added token", content, "text")
    for key in _STEPS:
        _steps(document.get(key), where, key)
    for key in ("padding", "truncation"):
        _expect(isinstance(document.get(key), dict | None), where, key, document.get(key), "an object")
    pad = (document.get("padding") or {}).get("pad_id")
    _expect(pad is None or is_id(pad), where, "padding.pad_id", pad, "a whole number")
    require_bounded(document, where)


def require_bounded(document: Mapping[str, Any], where: str) -> None:
    """Refuse a tokenizer.json that makes gigabytes of a few words, of which the library dies.

    Raises:
        InputError: naming what does.
    """
    padding = document.get("padding")
    padding = padding if isinstance(padding, dict) else {}
    strategy = padding.get("strategy")
    for width in (padding.get("pad_to_multiple_of"), strategy.get("Fixed") if isinstance(strategy, dict) else None):
        is_width = width is None or (type(width) is int and 0 <= width <= _MOST_PADDING)
        _expect(is_width, where, "a width of padding", width, f"at most {_MOST_PADDING}")
    for key in ("normalizer", "decoder"):
        times = round(_growth(document.get(key)))
        _expect(times <= _MOST_GROWTH, where, f"the growth of a text by its {key}", times, f"at most {_MOST_GROWTH}")


def _steps(value: Any, where: str, name: str) -> None:
    """Check a step, and those in it (without recursion: the depth is the file's)."""
    pending = [] if value is None else [(name, value)]
    while pending:
        name, step = pending.pop()
        _expect(isinstance(step, dict), where, name, step, "an object")
        for key in _STEP_LISTS:
            inner = step.get(key, [])
            _expect(isinstance(inner, list), where, f"{name}.{key}", inner, "a list")
            pending += [(f"{name}.{key}", item) for item in inner]
        pattern = step.get("pattern")
        _expect(isinstance(pattern, dict | None), where, f"{name}.pattern", pattern, "an object")


def _growth(value: Any) -> float:
    """How many times as long a step, and those in it, can make a text of one character."""
    pending, times, before = [value], 1.0, 0
    while pending:
        step = pending.pop()
        if not isinstance(step, dict):  # said elsewhere
            continue
        pending += [inner for key in _STEP_LISTS if isinstance(step.get(key), list) for inner in step[key]]
        content, prepend, pattern = step.get("content"), step.get("prepend"), step.get("pattern")
        replaced = pattern.get("String", "") if isinstance(pattern, dict) else ""
        if step.get("type") == "Replace" and isinstance(content, str) and isinstance(replaced, str):
            times = min(times * max(1, len(content) / max(1, len(replaced))), 1e9)
        before += len(prepend) if isinstance(prepend, str) else 0
    return times * (1 + before)


def _settings(document: Mapping[str, Any], where: str) -> None:
    decoder = document.get("added_tokens_decoder")
    _expect(isinstance(decoder, dict | None), where, "added_tokens_decoder", decoder, "an object")
    for i, token in (decoder or {}).items():
        is_known = i.isascii() and i.isdigit() and len(i) < 10 and is_id(int(i))
        _expect(is_known, where, "a key of added_tokens_decoder", i, f"an id below {MOST_IDS}")
        content = token.get("content") if isinstance(token, dict) else None
        _expect(isinstance(content, str), where, f"added_tokens_decoder.{i}", token, "an object with `content`")
    for key in _SPECIAL:
        stated = document.get(key)
        text = stated.get("content") if isinstance(stated, dict) else stated
        _expect(isinstance(text, str | None), where, key, stated, "text, or an object with `content`")
    extra = document.get("additional_special_tokens")
    for token in extra if isinstance(extra, list) else ():
        text = token.get("content") if isinstance(token, dict) else token
        _expect(isinstance(text, str), where, "one of additional_special_tokens", token, "text")
    longest = document.get("model_max_length")
    _expect(longest is None or _is_number(longest), where, "model_max_length", longest, "a finite number")


def template_text(data: bytes, where: str) -> str:
    """A chat template that lies in a file of its own.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error}", hint=AGAIN) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


_CHECKS: Mapping[str, Callable[[Mapping[str, Any], str], None]] = {
    **dict.fromkeys(names_of(FileKind.FAST), _tokenizer),
    **dict.fromkeys(names_of(FileKind.SETTINGS), _settings),
    **dict.fromkeys(names_of(FileKind.ADDED, FileKind.VOCABULARY), _ids),
}
