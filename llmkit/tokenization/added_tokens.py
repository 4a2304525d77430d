"""The tokens that are matched in a text as wholes, from every file that may list some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def added_tokens(
    listed: Mapping[str, int] | None, settings: Mapping[str, Any] | None, document: Mapping[str, Any] | None = None
) -> dict[int, dict[str, Any]]:
    """Id -> description (`content`, and `special`, `lstrip`, … where stated), special tokens of the model included.

    As transformers reads them: where files disagree of the text of an id, the later argument has it; where of how a
    text is matched, the earlier.

    Args:
        listed: added_tokens.json.
        settings: tokenizer_config.json, whose `added_tokens_decoder` has them by id.
        document: tokenizer.json.
    """
    tokens: dict[int, dict[str, Any]] = {i: {"content": text} for text, i in (listed or {}).items()}
    decoder = (settings or {}).get("added_tokens_decoder")
    tokens |= {int(i): dict(token) for i, token in decoder.items()} if isinstance(decoder, dict) else {}
    for token in (document or {}).get("added_tokens") or ():
        stated = tokens.get(token["id"], {})
        found = {key: value for key, value in token.items() if key != "id"}
        tokens[token["id"]] = found | (stated if stated.get("content") == token["content"] else {})
    return dict(sorted(tokens.items()))


def named_specials(settings: Mapping[str, Any], mapped: Mapping[str, Any] | None) -> list[str]:
    """The texts of all special tokens that are named, with or without an id, as transformers reads them.

    Args:
        settings: tokenizer_config.json.
        mapped: special_tokens_map.json, which counts where the former has no `added_tokens_decoder`.
    """
    stated = {**settings, **({} if "added_tokens_decoder" in settings else mapped or {})}
    found: list[Any] = [value for key, value in stated.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = stated.get(key)
        found += more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    texts = (token.get("content") if isinstance(token, dict) else token for token in found)
    return list(dict.fromkeys(text for text in texts if isinstance(text, str)))


def special_texts(settings: Mapping[str, Any]) -> set[str]:
    """The texts of `additional_special_tokens` in tokenizer_config.json."""
    stated = settings.get("additional_special_tokens")
    return {t["content"] if isinstance(t, dict) else t for t in (stated if isinstance(stated, list) else ())}
