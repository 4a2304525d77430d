"""Token ids and vocabulary sizes in config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import GENERATION_CONFIG, FileContent, read_generation_config
from llmkit.errors import SpecError

SIZE_KEYS = ("vocab_size", "padded_vocab_size", "n_vocab")
TABLE_KEY = "vocab_size_per_layer_input"
"""Rows of a table beside the embedding, which has as many after a change."""
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "bad_words_ids", "sequence_bias")


def with_vocab_size(config: Mapping[str, Any], n_rows: int) -> dict[str, Any]:
    """The config saying that the embedding has `n_rows` rows, under the keys it uses."""
    keys = [k for k in SIZE_KEYS if k in config] or list(SIZE_KEYS[:1])
    keys += [TABLE_KEY] if config.get(TABLE_KEY) == config.get(keys[0]) is not None else []
    return {**config, **dict.fromkeys(keys, n_rows)}


def mentioned_ids(ckpt: Checkpoint) -> list[int]:
    """Every token id that the configs name; not those below 0, which name none."""
    ids: list[int] = []
    for config in (ckpt.config, ckpt.generation_config):
        for key, value in config.items():
            if _holds_ids(key):
                ids += _integers(value)
            elif isinstance(value, dict):
                ids += [i for k, v in value.items() if _holds_ids(k) for i in _integers(v)]
    return sorted({i for i in ids if i >= 0})  # -1: none, as the first configs of Llama have it


def resized_config(
    config: Mapping[str, Any], n_old: int, n_new: int, new_of: Mapping[int, int], label: str
) -> dict[str, Any]:
    """config.json for `n_new` rows, its token ids mapped.

    Raises:
        SpecError: no size in it is the number of rows.
    """
    if not config:
        return {}
    sizes = [(k, v) for part in (config, *(v for v in config.values() if isinstance(v, dict)))
             for k, v in part.items() if k in SIZE_KEYS]  # fmt: skip
    if not any(v == n_old for _, v in sizes):
        stated = ", ".join(f"{k} {v}" for k, v in sizes) or "none of " + ", ".join(SIZE_KEYS)
        raise SpecError(
            f"{label}: the embedding has {n_old} rows, config.json says {stated}",
            hint=f"correct config.json: vocab_size {n_old}",
        )
    return _mapped(config, new_of, n_old, n_new)


def renumbered_generation(files: Mapping[str, FileContent], new_of: Mapping[int, int]) -> dict[str, FileContent]:
    """The same files with the ids of generation_config.json mapped."""
    config, _ = read_generation_config(files)
    if not config:
        return dict(files)
    mapped = _mapped(config, new_of, -1, -1)
    return dict(files) if mapped == config else {**files, GENERATION_CONFIG: FileContent.of_json(mapped)}


def _mapped(config: Mapping[str, Any], new_of: Mapping[int, int], n_old: int, n_new: int) -> dict[str, Any]:
    mapped: dict[str, Any] = {}
    for key, value in config.items():
        if (key in SIZE_KEYS and value == n_old) or (key == TABLE_KEY and n_new >= 0):
            mapped[key] = n_new
        elif _holds_ids(key):
            mapped[key] = _replaced(value, new_of)
        elif isinstance(value, dict):
            mapped[key] = _mapped(value, new_of, n_old, n_new)
        else:
            mapped[key] = value
    return mapped


def _holds_ids(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids", "_token_index")) or key in _LISTS


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _integers(one)


def _replaced(value: Any, new_of: Mapping[int, int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return new_of.get(value, value)
    return [_replaced(v, new_of) for v in value] if isinstance(value, list) else value
