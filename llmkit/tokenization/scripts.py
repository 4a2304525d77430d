"""Which script a token is written in, by the names of Unicode characters."""

from __future__ import annotations

import unicodedata
from functools import cache

_NAMES = {"CJK": "Han", "FULLWIDTH": "fullwidth forms", "HALFWIDTH": "halfwidth forms"}


def script_of(text: str) -> str:
    """`Latin`, `Han`, `Cyrillic`, … of the first letter; `digits`, `punctuation`, `symbols` or `space` without one."""
    for character in text:
        if unicodedata.category(character)[0] == "L":
            return _script(character)
    kinds = [unicodedata.category(c)[0] for c in text]
    for kind, name in (("N", "digits"), ("P", "punctuation"), ("S", "symbols"), ("M", "marks")):
        if kind in kinds:
            return name
    return "space" if text and not text.strip() else "other"


@cache
def _script(character: str) -> str:
    name = unicodedata.name(character, "other").split(" ")[0]
    return _NAMES.get(name, name.capitalize())
