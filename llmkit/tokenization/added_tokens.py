"""The tokens that are matched in a text as wholes, from every file that may list some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def added_tokens(
    listed: Mapping[str, int] | None, settings: Mapping[str, Any] | None, document: Mapping[str, Any] | None = None
) -> dict[int, dict[str, Any]]:
    """Id -> description (`content`, and `special`, `lstrip`, … where stated), special tokens of the model included.

    Where files disagree of an id, the later argument has it, as transformers reads them.

    Args:
        listed: added_tokens.json.
        settings: tokenizer_config.json, whose `added_tokens_decoder` has them by id.
        document: tokenizer.json.
    """
    tokens: dict[int, dict[str, Any]] = {i: {"content": text} for text, i in (listed or {}).items()}
    decoder = (settings or {}).get("added_tokens_decoder")
    tokens |= {int(i): dict(token) for i, token in decoder.items()} if isinstance(decoder, dict) else {}
    for token in (document or {}).get("added_tokens") or ():
        tokens[token["id"]] = {key: value for key, value in token.items() if key != "id"}
    return dict(sorted(tokens.items()))


def special_texts(settings: Mapping[str, Any]) -> set[str]:
    """The texts of `additional_special_tokens` in tokenizer_config.json."""
    stated = settings.get("additional_special_tokens")
    return {t["content"] if isinstance(t, dict) else t for t in (stated if isinstance(stated, list) else ())}
