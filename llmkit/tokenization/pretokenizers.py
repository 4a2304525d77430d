"""How byte-level BPE cuts text into words before merging: GGUF's names of it, and what tokenizer.json has for each.

GGUF says `tokenizer.ggml.pre`, tokenizer.json spells the steps out. Several names stand for the same steps (llama.cpp
has one for each published tokenizer, and treats them otherwise alike or nearly so).

Source: the tokenizer.json of the published models; names from ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Step = Mapping[str, Any]

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS_BY_3 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_DIGITS_BY_1 = rf"{_ENGLISH}|{_WORDS}|\p{{N}}|{_REST}"
_WITH_MARKS = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_SENTENCES = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_DEEPSEEK = (
    r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)  # fmt: skip


def _split(pattern: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool = False) -> Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _digits(one_by_one: bool) -> Step:
    return {"type": "Digits", "individual_digits": one_by_one}


_PLAIN = (_bytes(use_regex=True),)
_SINGLE_DIGITS = (_digits(True), _bytes(use_regex=True))
_STEPS: Mapping[str, Sequence[Step]] = {
    "gpt-2": _PLAIN, "olmo": _PLAIN, "mpt": _PLAIN, "phi-2": _PLAIN, "jais": _PLAIN, "exaone4": _PLAIN,
    "smollm": _SINGLE_DIGITS, "starcoder": _SINGLE_DIGITS, "refact": _SINGLE_DIGITS, "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS, "exaone": _SINGLE_DIGITS, "minerva-7b": _SINGLE_DIGITS,
    "llama-bpe": (_split(_DIGITS_BY_3), _bytes()), "llama3": (_split(_DIGITS_BY_3), _bytes()),
    "llama-v3": (_split(_DIGITS_BY_3), _bytes()), "dbrx": (_split(_DIGITS_BY_3), _bytes()),
    "smaug-bpe": (_split(_DIGITS_BY_3), _bytes()), "falcon3": (_split(_DIGITS_BY_3), _bytes()),
    "chatglm-bpe": (_split(_DIGITS_BY_3), _bytes()), "glm4": (_split(_DIGITS_BY_3), _bytes()),
    "qwen2": (_split(_DIGITS_BY_1), _bytes()), "stablelm2": (_split(_DIGITS_BY_1), _bytes()),
    "deepseek-r1-qwen": (_split(_DIGITS_BY_1), _bytes()), "megrez": (_split(_DIGITS_BY_1), _bytes()),
    "qwen35": (_split(_WITH_MARKS), _bytes()), "seed-coder": (_split(_SEED), _bytes()),
    "tekken": (_split("|".join((*_CASED, r"\p{N}", _CASED_REST))), _bytes()),
    "gpt-4o": (_split("|".join((*(f"{c}{_ENGLISH}?" for c in _CASED), r"\p{N}{1,3}", _CASED_REST))), _bytes()),
    "deepseek-v3": (*map(_split, _DEEPSEEK), _bytes()),
    "falcon": (
        {"type": "Punctuation", "behavior": "Contiguous"}, _bytes(use_regex=True), _digits(False),
        _split("[0-9][0-9][0-9]"),
    ),
    "bloom": (_split(_SENTENCES), _bytes()), "poro-chat": (_split(_SENTENCES), _bytes()),
}  # fmt: skip
NAMES = tuple(_STEPS)
NFC = {"type": "NFC"}
IGNORING_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "glm4")
"""Names with which a word that is a token is taken whole."""
ADDING_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
"""Names with which a text begins with bos unless the file says otherwise."""
COMPOSING = ("qwen2", "olmo", "deepseek-r1-qwen")
"""Names with which text is brought to Unicode's composed form (NFC) first."""


def pre_tokenizer_of(name: str) -> dict[str, Any] | None:
    """The `pre_tokenizer` of tokenizer.json for GGUF's `name`; None for a name that is not known."""
    steps = _STEPS.get(name)
    if steps is None:
        return None
    return dict(steps[0]) if len(steps) == 1 else {"type": "Sequence", "pretokenizers": [dict(s) for s in steps]}


def name_of(pre_tokenizer: Mapping[str, Any] | None, normalizer: object = None, hint: str | None = None) -> str | None:
    """GGUF's name for a `pre_tokenizer` of tokenizer.json.

    Args:
        normalizer: that of tokenizer.json, which tells where several names fit.
        hint: the name to take then.

    Returns:
        None for one that GGUF has no name for.
    """
    wanted = _signature(pre_tokenizer)
    fitting = [name for name, steps in _STEPS.items() if _signature({"pretokenizers": steps}) == wanted]
    if hint is None and normalizer == NFC:
        hint = next((name for name in fitting if name in COMPOSING), None)
    return hint if hint in fitting else next(iter(fitting), None)


def name_of_pattern(pattern: str) -> str | None:
    """GGUF's name for words cut by one pattern, as a tiktoken file's code states it."""
    return name_of({"pretokenizers": [_split(pattern), _bytes()]})


def _signature(pre_tokenizer: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    """What a pre-tokenizer does, without what makes no difference to the ids."""
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    signature: list[tuple[str, ...]] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split":
            pattern = step.get("pattern") or {}
            text = pattern.get("Regex") or re.escape(str(pattern.get("String")))
            signature.append(("split", str(text), str(step.get("behavior")), str(bool(step.get("invert")))))
        elif kind == "Digits":
            signature.append(("digits", str(bool(step.get("individual_digits")))))
        elif kind == "Punctuation":
            signature.append(("punctuation", str(step.get("behavior"))))
        elif kind == "ByteLevel":
            signature.append(("bytes", str(bool(step.get("use_regex", True))), str(bool(step.get("add_prefix_space")))))
        else:
            signature.append((str(kind),))
    return signature
