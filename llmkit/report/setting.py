"""How the page sets text that comes from outside: escaped, isolated, and in its language."""

from __future__ import annotations

import re
from math import isfinite
from typing import Any

from markupsafe import Markup

from llmkit.evaluation.statistics import Mean

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_KANA = re.compile("[\u3040-\u30ff]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_HANGUL = re.compile("[\u1100-\u11ff\uac00-\ud7af]")


def language_of(text: str) -> str:
    """The BCP 47 tag of a text in a script that fonts set by language; empty for others."""
    scripts = ((_KANA, "ja"), (_HANGUL, "ko"), (_HAN, "zh-Hans"))
    return next((tag for pattern, tag in scripts if pattern.search(text)), "")


def plain(text: str) -> str:
    """Text that a document may hold: control characters and lone surrogates become replacement characters."""
    return _CONTROL.sub("\ufffd", text)


def isolated(text: object) -> Markup:
    """Text from outside as HTML: escaped, marked with its language, its writing direction isolated (`<bdi>`)."""
    shown = plain(str(text))
    tag = language_of(shown)
    language = Markup(' lang="{}"').format(tag) if tag else ""
    return Markup('<bdi dir="auto"{}>{}</bdi>').format(language, shown)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage, without its sign: 0.4321 -> 43.2."""
    return "–" if share is None or not isfinite(share) else f"{100 * share:.{digits}f}"


def signed(share: float | None) -> str:
    """A difference of shares in points, with its sign where it has one when it is rounded."""
    if share is None or not isfinite(share):
        return "–"
    text = f"{100 * share:+.1f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]


def number(value: Any, digits: int = 3) -> str:
    """A figure with so many significant digits, thousands set apart; what is no number stays text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if not isfinite(value):
        return str(value)
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.{digits}g}" if abs(value) < 1e-4 else f"{value:#.{digits}g}".rstrip(".")


def interval_words(mean: Mean) -> str:
    """`(95 % interval 41.2 to 45.0)`."""
    bounds = mean.interval
    return f"(95 % interval {percent(bounds[0])} to {percent(bounds[1])})" if bounds else "(no interval)"


def with_interval(mean: Mean) -> str:
    """`43.1 % [41.2, 45.0]`."""
    bounds = mean.interval
    return f"{percent(mean.value)} %" + (f" [{percent(bounds[0])}, {percent(bounds[1])}]" if bounds else "")
