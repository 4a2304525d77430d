"""Tables of the page: rows of figures, each with the strip of a plot that shows the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmkit.report.setting import percent
from llmkit.report.svg import Dot, Scale, axis_strip, dot_strip, legend_mark


@dataclass(frozen=True, slots=True)
class Table:
    """Figures by row and column; the first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Figures:
    """A value, its interval, and their texts in the table.

    Attributes:
        series: which run it is of.
        text: the value and its interval in figures; `more` follows, and is not broken over lines.
        words: the same in words, for who points at the mark.
    """

    series: int
    value: float
    low: float | None
    high: float | None
    text: str
    words: str
    more: str = ""

    @property
    def dot(self) -> Dot:
        """As a plot shows it."""
        return Dot(self.value, self.low, self.high, self.series, self.words)


@dataclass(frozen=True, slots=True)
class PlotRow:
    """One row: a name, figures of one or several runs, and the strip that shows them.

    Attributes:
        note: what stands beside the name, softly.
        n: how many questions are behind it; 0 is not said.
        is_group: it sums up rows that follow.
    """

    label: str
    note: str
    is_group: bool
    dots: Sequence[Figures]
    strip: Markup
    n: int = 0

    @classmethod
    def drawn(
        cls,
        scale: Scale,
        label: str,
        dots: Sequence[Figures],
        *,
        note: str = "",
        is_group: bool = False,
        reference: float | None = None,
        n: int = 0,
    ) -> PlotRow:
        """A row with its strip."""
        words = "; ".join(f"{label}: {d.words}" for d in dots)
        strip = dot_strip(scale, [d.dot for d in dots], words, reference)
        return cls(label, note, is_group, dots, strip, n)


@dataclass(frozen=True, slots=True)
class PlotTable:
    """Rows under one axis.

    Attributes:
        what, value: what the first two columns are called.
        axis: labels of the ticks, above the strips.
        has_keys: each figure has the mark of its run.
    """

    caption: str
    what: str
    value: str
    axis: Markup
    rows: Sequence[PlotRow]
    has_keys: bool

    def key(self, series: int) -> Markup:
        """The mark of a run, before its figures."""
        return legend_mark(series) if self.has_keys else Markup("")


def percent_axis(scale: Scale, *, is_signed: bool = False) -> Markup:
    """Ticks of shares, in percent (or points, with their sign)."""
    digits = next((d for d in range(3) if all(abs(round(100 * t, d) - 100 * t) < 1e-9 for t in scale.ticks)), 3)
    labels = {t: percent(t, digits).replace("-", "−") for t in scale.ticks}
    if is_signed:
        labels = {t: f"+{label}" if t > 0 else label for t, label in labels.items()}
    return axis_strip(scale, labels)
