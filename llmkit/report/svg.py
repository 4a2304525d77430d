"""Small plots as SVG whose horizontal positions are shares of the width: they fit a phone, a desktop and paper alike.

A plot is a column of strips, one in each row of a table that says the same in figures. No strip has a `viewBox`, so
text and marks keep their size whatever the width; colours are CSS classes, so that they follow light, dark and print.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from markupsafe import Markup

LINE = 18
"""Pixels from one mark to the next in a strip: the height of the line of text that says the same."""
_MAX_TICKS = 5  # whose labels stand beside each other on a phone
_SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "M-4-4h8v8h-8z",
    "M0-5.2 4.8 3.6h-9.6z",
    "M0-5.5 5.5 0 0 5.5-5.5 0z",
)
_N_COLOURS = 4  # s0 to s3 in page.css


@dataclass(frozen=True, slots=True)
class Scale:
    """A horizontal axis from `low` to `high`, with ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> str:
        """Where a value is, as a share of the width; values beyond the axis are at its end."""
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * min(max(share, 0.0), 1.0):.3f}%"


def scale_of(values: Iterable[float | None], *, low: float = float("-inf"), high: float = float("inf")) -> Scale:
    """An axis with round ends that holds all finite `values`, within `low` and `high`."""
    finite = [v for v in values if v is not None and isfinite(v)] or [0.0]
    first, last = max(min(finite), low), min(max(finite), high)
    if last - first < 1e-9:
        first, last = max(first - 0.05, low), min(last + 0.05, high)
    unit = 10 ** floor(log10((last - first) / 4))
    for step in (unit * m for m in (1, 2, 2.5, 5, 10, 20, 25)):
        start, stop = floor(first / step + 1e-9), ceil(last / step - 1e-9)
        if stop - start < _MAX_TICKS:
            break
    ticks = tuple(round(i * step, 12) for i in range(start, stop + 1))
    ends = max(ticks[0], low), min(ticks[-1], high)
    return Scale(*ends, tuple(t for t in ticks if ends[0] <= t <= ends[1]))


@dataclass(frozen=True, slots=True)
class Dot:
    """A value with its interval; `series` chooses colour and shape.

    Attributes:
        low, high: ends of the interval; None where it is undefined.
        words: what the mark says to who points at it or does not see it.
    """

    value: float
    low: float | None
    high: float | None
    series: int
    words: str


def dot_strip(scale: Scale, dots: Sequence[Dot], words: str, reference: float | None = None) -> Markup:
    """Values with intervals over one axis, one below the other.

    Args:
        words: the strip's text alternative.
        reference: where a dashed line stands (chance level, no difference).
    """
    height = LINE * max(len(dots), 1)
    parts = [_line(scale.at(t), 0, height, "grid") for t in scale.ticks]
    if reference is not None and scale.low <= reference <= scale.high:
        parts.append(_line(scale.at(reference), 0, height, "reference"))
    for i, dot in enumerate(dots):
        y = LINE // 2 + i * LINE
        drawn = []
        if dot.low is not None and dot.high is not None:
            x1, x2 = scale.at(dot.low), scale.at(dot.high)
            drawn.append(element("line", class_=f"interval s{dot.series % _N_COLOURS}", x1=x1, x2=x2, y1=y, y2=y))
        drawn.append(element("svg", _mark(dot.series), x=scale.at(dot.value), y=y, overflow="visible"))
        parts.append(element("g", [element("title", dot.words), *drawn]))
    return picture(parts, words, height)


def axis_strip(scale: Scale, labels: Mapping[float, str]) -> Markup:
    """The labels of the ticks; a reader of the table needs none, so they are hidden from screen readers."""
    parts = []
    for tick in scale.ticks:
        x = scale.at(tick)
        anchor = {"0.000%": "start", "100.000%": "end"}.get(x, "middle")
        parts.append(element("text", labels[tick], x=x, y=12, text_anchor=anchor, class_="tick"))
    return element("svg", parts, class_="strip", width="100%", height=16, aria_hidden="true")


@dataclass(frozen=True, slots=True)
class Cell:
    """One rectangle of a heat map: its darkness is a share from 0 to 1."""

    share: float
    words: str


def heat_strip(cells: Sequence[Cell | None], words: str) -> Markup:
    """A row of a heat map; None leaves a gap."""
    width = 100 / max(len(cells), 1)
    parts = [
        element(
            "rect", element("title", cell.words), class_="cell", x=f"{i * width:.4f}%", y=0, width=f"{width:.4f}%",
            height=22, fill_opacity=f"{0.06 + 0.94 * cell.share:.3f}",
        )
        for i, cell in enumerate(cells)
        if cell is not None
    ]  # fmt: skip
    return picture(parts, words, 22)


def picture(parts: Sequence[Markup], words: str, height: int) -> Markup:
    """An SVG as wide as its place, with a text alternative."""
    return element("svg", [element("title", words), *parts], class_="strip", role="img", width="100%", height=height)


def legend_mark(series: int) -> Markup:
    """The mark of a run, for a legend."""
    return element("svg", _mark(series), class_="key", width=12, height=12, viewBox="-6 -6 12 12", aria_hidden="true")


def _mark(series: int) -> Markup:
    """Runs after the fourth repeat the colours, with another shape."""
    shape = _SHAPES[(series // _N_COLOURS + series) % len(_SHAPES)]
    return element("path", class_=f"mark s{series % _N_COLOURS}", d=shape)


def _line(x: str, top: int, bottom: int, kind: str) -> Markup:
    return element("line", class_=kind, x1=x, x2=x, y1=top, y2=bottom)


def element(name: str, content: str | Sequence[Markup] = "", **attributes: str | int) -> Markup:
    """An element; text and attributes are escaped. `class_` and `text_anchor` are spelt as Python can."""
    inner = Markup.escape(content) if isinstance(content, str) else Markup("").join(content)
    named = [(k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items()]
    shown = Markup("").join(Markup(' {}="{}"').format(Markup(k), v) for k, v in named)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), shown, inner)
