"""The page as Chromium draws it: positions, colours, widths, contrast; without scripts, too, on screen and paper."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
import report_world as world

PHONE, DESK = (360, 800), (1280, 900)
PAPER = 688  # pixels between the margins of A4
PAGES = ["mmlu", "ceval", "three", "one question", "perplexity", "checkpoint", "tasks"]
COLOURS = {
    "light": [(5, 80, 174), (179, 66, 11), (26, 127, 55)],
    "dark": [(88, 166, 255), (240, 136, 62), (63, 185, 80)],
}

ROWS = """[...document.querySelectorAll('#accuracy tbody tr')].map(row => {
  const ends = b => [b.left, b.right, b.top + scrollY, b.bottom + scrollY], box = e => ends(e.getBoundingClientRect());
  const strip = row.querySelector('svg.strip'), all = (from, what) => [...from.querySelectorAll(what)].map(box);
  return {label: row.querySelector('th bdi').textContent, plot: box(strip),
    th: box(row.querySelector('th')), value: box(row.querySelector('.value')),
    marks: all(strip, '.mark'), intervals: all(strip, '.interval'), figures: all(row, '.run')}})"""

# Text that is seen: its colour and that of the nearest background, its size, and how far right it reaches.
TEXTS = """(() => {
  const seen = new Map(), clear = 'rgba(0, 0, 0, 0)';
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement, style = getComputedStyle(e);
    if (!node.textContent.trim() || e.closest('title') || !e.getClientRects().length) continue;
    let back = e;
    while (back && getComputedStyle(back).backgroundColor === clear) back = back.parentElement;
    const ink = e.closest('svg') ? style.fill : style.color;
    const paper = getComputedStyle(back || document.body).backgroundColor;
    const range = document.createRange(), key = [ink, paper, style.fontSize].join('|');
    range.selectNodeContents(node);
    const first = {ink, paper, size: parseFloat(style.fontSize), text: node.textContent.slice(0, 40), right: 0};
    const entry = seen.get(key) || first;
    if (!e.closest('.scroll,.text')) entry.right = Math.max(entry.right, range.getBoundingClientRect().right);
    seen.set(key, entry);
  }
  return [...seen.values()] })()"""


def rgb(text: str) -> tuple[int, ...]:
    return tuple(int(float(x)) for x in re.findall(r"[\d.]+", text)[:3])


def luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", PAGES)
def test_it_fits_a_phone_and_its_text_is_read_light_and_dark(browser, pages, name):
    for size, scheme in ((PHONE, "light"), (PHONE, "dark"), (DESK, "light")):
        browser.open(pages[name], *size, scheme=scheme)
        assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
        texts = browser.evaluate(TEXTS)
        for text in texts:
            assert contrast(rgb(text["ink"]), rgb(text["paper"])) >= 4.5, (scheme, text)
            assert text["size"] >= 12, text
            assert text["right"] <= size[0] + 0.5, text
        papers = {rgb(t["paper"]) for t in texts}
        assert all((luminance(p) < 0.1) == (scheme == "dark") for p in papers), papers
        assert browser.requests == [pages[name].as_uri()]


@pytest.mark.parametrize(
    ("size", "scheme", "scripts"), [(PHONE, "light", False), (DESK, "dark", False), (DESK, "light", True)]
)
def test_marks_stand_where_the_figures_say(browser, pages, size, scheme, scripts):
    """Boxes and pixels of the first rows: of three runs, drawn without scripts as well as with them."""
    first = world.mmlu(seed=2, only=3, n=20)
    results = [first, world.changed(first, 3, 0.3), world.changed(first, 4, 0.6)]
    browser.open(pages["three"], *size, scheme=scheme, scripts=scripts)
    rows = {row["label"]: row for row in browser.evaluate(ROWS)}
    top = min(row["plot"][2] for row in rows.values()) - 60
    browser.evaluate(f"scrollTo(0, {top})")
    top = browser.evaluate("scrollY")
    picture = browser.pixels()
    expected = {"all questions": [r.micro for r in results], "mean of subjects": [r.macro for r in results]}
    expected |= {s.name.replace("_", " "): [r.subjects[i].acc for r in results] for i, s in enumerate(first.subjects)}
    n_seen = 0
    for label, means in expected.items():
        row = rows[label]
        left, right = row["plot"][:2]
        assert right - left > 0.25 * size[0]
        for i, (mean, mark, interval, figure) in enumerate(
            zip(means, row["marks"], row["intervals"], row["figures"], strict=True)
        ):
            x, y = left + (right - left) * mean.value, (mark[2] + mark[3]) / 2
            assert (mark[0] + mark[1]) / 2 == pytest.approx(x, abs=0.6)
            low, high = mean.interval
            assert interval[0] == pytest.approx(left + (right - left) * max(low, 0), abs=0.6)
            assert interval[1] == pytest.approx(left + (right - left) * min(high, 1), abs=0.6)
            if size == DESK:  # beside the figure that it shows
                assert figure[2] <= y <= figure[3]
            if 0 <= y - top < size[1] - 2:
                seen = picture[round(y - top), round(x)].astype(int)
                n_seen += int(np.abs(seen - COLOURS[scheme][i]).max() <= 12)
    assert n_seen >= 9
    for row in rows.values():  # name and figures do not overlap
        assert row["th"][1] <= row["value"][0] + 0.5 or row["th"][3] <= row["value"][2] + 0.5


def test_accuracies_of_tasks_are_drawn_with_the_intervals_of_their_errors(browser, pages):
    for size in (PHONE, DESK):
        browser.open(pages["tasks"], *size)
        rows = browser.evaluate(ROWS)
        assert [r["label"] for r in rows] == [
            "arc_challenge", "arc_challenge", "hellaswag", "gsm8k", "gsm8k", "ifeval", "ifeval", "a_group",
        ]  # fmt: skip
        values = [(0.31, 1172), (0.35, 1172), (0.42, 900), (0.05, 200), (0.15, 200), (0.27, 0), (0.16, 541)]
        axis = browser.evaluate(
            """[...document.querySelectorAll('#accuracy thead .strip text')].map(t => {
            const b = t.getBoundingClientRect(); return [parseFloat(t.textContent), b.left, b.right] })"""
        )
        top = max(value for value, *_ in axis) / 100
        for row, (value, n) in zip(rows, values, strict=False):
            left, right = row["plot"][:2]
            x = left + (right - left) * value / top
            assert (row["marks"][0][0] + row["marks"][0][1]) / 2 == pytest.approx(x, abs=0.6)
            if not n:
                assert len(row["intervals"]) == 0  # more instructions than questions: lm-eval gives no error
                continue
            # Wilson's interval, from its definition: the shares at 1.96 of their own standard errors
            low, high = ((x - left) / (right - left) * top for x in row["intervals"][0][:2])
            for end in (low, high):
                assert abs(end - value) / (end * (1 - end) / n) ** 0.5 == pytest.approx(1.96, rel=0.15)


@pytest.mark.parametrize("width", [PHONE[0], 500, PAPER, 703, DESK[0]])
def test_labels_of_an_axis_stand_over_its_lines(browser, pages, width):
    browser.open(pages["tasks"], width, 900)
    labels, lines = browser.evaluate(
        """[[...document.querySelectorAll('#accuracy thead .strip text')], [...document.querySelector(
        '#accuracy tbody .strip').querySelectorAll('.grid')]].map(some => some.map(e => {
        const b = e.getBoundingClientRect(); return (b.left + b.right) / 2 }))"""
    )
    assert len(labels) == len(lines) == 4
    assert labels[1:-1] == pytest.approx(lines[1:-1], abs=1.0)  # the outermost labels stand within the strip
    assert labels[0] == pytest.approx(lines[0], abs=16)
    assert labels[-1] == pytest.approx(lines[-1], abs=16)


def test_without_scripts_it_is_the_same_picture(browser, pages):
    shots = []
    for scripts in (True, False):
        browser.open(pages["mmlu"], *DESK, scripts=scripts)
        shots.append(browser.pixels())
    assert np.array_equal(*shots)
    assert len(np.unique(shots[0].astype(int) @ [1, 256, 65536])) > 50  # something is drawn


def test_the_heat_map_darkens_with_the_errors(browser, pages):
    browser.open(pages["checkpoint"], *DESK)
    browser.evaluate("document.querySelector('#errors .heat').scrollIntoView()")
    cells = browser.evaluate(
        """[...document.querySelectorAll('.heat tr')].map(r => [...r.querySelectorAll('.cell')].map(c => {
        const b = c.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2] }))"""
    )
    assert [len(row) for row in cells] == [32] * 4
    picture = browser.pixels().astype(int)
    light = [[picture[round(y), round(x)].sum() for x, y in row] for row in cells]
    assert all(a > b for row in light for a, b in pairwise(row))  # errors rise with the layer
    assert all(a > b for column in zip(*light, strict=True) for a, b in pairwise(column))


def test_on_paper_it_is_light_and_whole(browser, pages):
    browser.open(pages["mmlu"], *DESK, scheme="dark")
    data = browser.pdf()
    n_pages = len(re.findall(rb"/Type\s*/Page\b", data))
    assert data.startswith(b"%PDF-")
    assert 2 <= n_pages <= 6
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    texts = browser.evaluate(TEXTS)
    assert {rgb(t["paper"]) for t in texts} == {(255, 255, 255)}
    assert min(contrast(rgb(t["ink"]), rgb(t["paper"])) for t in texts) >= 4.5
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_nothing_is_cut_on_paper(browser, pages):
    """At the width that A4 has between its margins; labels of an axis stand apart."""
    browser.open(pages["three"], PAPER, 1000)
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("document.documentElement.scrollWidth") <= PAPER
    wide = browser.evaluate("[...document.querySelectorAll('.scroll, table')].map(e => [e.scrollWidth, e.clientWidth])")
    assert all(content <= place for content, place in wide), wide
    axes = browser.evaluate(
        """[...document.querySelectorAll('thead .strip')].map(s => [...s.querySelectorAll('text')].map(t => {
        const b = t.getBoundingClientRect(); return [b.left, b.right] }))"""
    )
    assert axes
    for labels in axes:
        assert all(a[1] + 2 <= b[0] for a, b in pairwise(labels)), labels


def test_chinese_is_set_with_room_between_lines(browser, pages):
    browser.open(pages["ceval"], *PHONE)
    rows = browser.evaluate(
        """[...document.querySelectorAll('th .note')].map(e => { const style = getComputedStyle(e.querySelector('bdi'));
        return [e.textContent, e.getBoundingClientRect().height, parseFloat(style.lineHeight), style.lineBreak] })"""
    )
    assert len(rows) >= 52
    chinese = [r for r in rows if re.search("[\u4e00-\u9fff]", r[0])]
    assert {line_break for *_, line_break in chinese} == {"strict"}
    short = [height for text, height, line, _ in chinese if len(text) <= 8]
    assert max(short) <= 26  # a short name is not broken over two lines
