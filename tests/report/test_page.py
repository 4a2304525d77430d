"""The page as text: it is whole without network and scripts, and obeys nothing that questions say."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import report_world as world

from llmkit.evaluation.formats.format import format_for
from llmkit.evaluation.report_inputs import ReportInputs
from llmkit.report.page import render
from llmkit.report.setting import number, percent, plain, signed
from llmkit.report.svg import scale_of

VOID = {"meta", "link", "br", "img", "input"}


class Parsed(HTMLParser):
    """Elements with their attributes and text, as a browser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag, "elements are nested"

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def of(self, **wanted):
        return [e for e in self.elements if all(value in (e.get(key) or "").split() for key, value in wanted.items())]


@pytest.fixture(scope="module")
def parsed(pages):
    return {name: Parsed(path.read_text(encoding="utf-8")) for name, path in pages.items()}


def test_no_page_has_a_script_or_asks_for_anything(parsed):
    for page in parsed.values():
        assert page.open == []
        tags = {e["tag"] for e in page.elements}
        assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
        for element in page.elements:
            assert not [key for key in element if key.startswith("on")]
            targets = [element[key] for key in ("src", "href", "data", "action") if element.get(key)]
            assert all(target.startswith(("#", "data:,")) for target in targets)
        (style,) = [e["text"] for e in page.elements if e["tag"] == "style"]
        assert not re.search(r"url\(|@import", style)


def test_links_lead_to_sections(parsed):
    for page in parsed.values():
        ids = [e["id"] for e in page.elements if "id" in e]
        assert len(ids) == len(set(ids))
        assert [e["href"][1:] for e in page.elements if e["tag"] == "a"] == [
            e["id"] for e in page.elements if e["tag"] == "section"
        ]


def test_hostile_questions_are_text(parsed):
    shown = [e["text"] for e in parsed["three"].of(**{"class": "text"})]
    for text in world.HOSTILE:
        assert plain(text) in shown
    assert any("\ufffd[31mcontrol\ufffd" in text for text in shown)


def test_no_name_brings_in_what_a_document_may_not_hold():
    name = 'a"\x00\ud800\x1b]0;<i>&'
    first = world.mmlu(seed=1, only=1)
    subject = replace(
        first.subjects[0], subject=replace(first.subjects[0].subject, name=name, label=name, category=name)
    )
    result = replace(first, bench=replace(first.bench, title=name, subjects=(subject.subject,)), subjects=(subject,))
    runs = [world.run(f"{name}{i}", result, samples=True, history=(name,) * i) for i in range(2)]
    text = render(ReportInputs(tuple(runs)))
    text.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)
    page = Parsed(text)
    assert "i" not in {e["tag"] for e in page.elements}
    assert page.of(**{"class": "strip"})


def test_text_from_outside_is_isolated_and_in_its_language(parsed):
    isolated = [e for e in parsed["ceval"].elements if e["tag"] == "bdi"]
    chinese = [e for e in isolated if re.search("[\u4e00-\u9fff]", e["text"])]
    assert len(chinese) > 52
    assert {e.get("lang") for e in chinese} == {"zh-Hans"}
    assert {e["dir"] for e in isolated} == {"auto"}


def test_every_plot_has_words_and_its_figures_stand_beside_it(parsed):
    plots = [e for page in parsed.values() for e in page.of(**{"class": "strip"}) if e.get("aria-hidden") is None]
    assert plots
    assert all(e["role"] == "img" and e["text"] for e in plots)
    result = world.mmlu(seed=1)
    rows = [e["text"] for e in parsed["mmlu"].elements if e["tag"] == "tr"]
    for subject in result.subjects:
        name, figure = subject.name.replace("_", " "), f"{100 * subject.acc.value:.1f}"
        (row,) = [r for r in rows if r.startswith(f"{name}\u00a0{subject.acc.n}")]
        assert figure in row


def test_runs_are_compared_with_the_first_on_the_same_questions(parsed):
    """Counted here by hand, from the questions of the runs."""
    first = world.mmlu(seed=2, only=3, n=20)
    second = world.changed(first, 3, 0.3)
    rows = [e["text"] for e in parsed["three"].elements if e["tag"] == "tr" and ("↓" in e["text"])]
    sentences = [e["text"] for e in parsed["three"].of(**{"class": "sentence"})]
    pairs = [
        list(zip(a.questions, b.questions, strict=True)) for a, b in zip(first.subjects, second.subjects, strict=True)
    ]
    names = ["all questions", *(s.name.replace("_", " ") for s in first.subjects)]
    for name, some in zip(names, [[p for each in pairs for p in each], *pairs], strict=True):
        wrong = sum(a.choice == a.target != b.choice for a, b in some)
        right = sum(a.choice != a.target == b.choice for a, b in some)
        (row,) = [r for r in rows if r.startswith(name)]
        assert signed((right - wrong) / len(some)) in row
        assert f"{wrong}↓ {right}↑" in row
        if name == "all questions":
            flipped = f"{wrong} questions flipped to wrong, {right} to right."
            assert sum(s.startswith("vicuna-7b-int8 is ") and s.endswith(flipped) for s in sentences) == 2


def test_the_large_figure_is_the_average_that_the_protocol_reports(tmp_path):
    result = replace(world.ceval(seed=2, only=4), protocol="official", average="macro")
    run = world.run("m", result)
    page = Parsed(render(ReportInputs((run,))))
    assert page.of(**{"class": "figure"})[0]["text"] == f"{100 * result.macro.value:.1f} %"
    assert any("C-Eval official, 5 shots" in e["text"] for e in page.elements if e["tag"] == "h3")
    (path,) = format_for(tmp_path, "hub").write(ReportInputs((run,)), tmp_path)
    assert f"value: {100 * result.macro.value:.2f}"[:11] in path.read_text()
    assert "protocol official, mean of subjects" in path.read_text()


def test_an_answer_that_could_not_be_read_is_said():
    first = world.mmlu(seed=1, only=1)
    blank = tuple(replace(q, choice="") for q in first.subjects[0].questions)
    second = replace(first, subjects=(world.subject_result(first.subjects[0].subject, list(blank)),))
    page = Parsed(render(ReportInputs((world.run("a", first, samples=True), world.run("b", second, samples=True)))))
    shown = [e["text"] for e in page.of(**{"class": "question"})]
    assert shown
    assert all("no answer that could be readb" in text for text in shown)


def test_runs_that_cannot_be_compared_are_shown_beside_each_other():
    runs = world.run("a", world.mmlu(seed=1, only=1)), world.run("b", world.ceval(seed=1, only=1))
    page = Parsed(render(ReportInputs(runs)))
    assert "comparison" not in {e.get("id") for e in page.elements}
    assert "not compared: a and b have no benchmark in common" in page.of(**{"class": "warnings"})[0]["text"]


def test_what_is_not_there_makes_no_section(parsed):
    def sections(name):
        return [e["id"] for e in parsed[name].elements if e["tag"] == "section"]

    assert sections("mmlu") == ["summary", "accuracy", "details"]
    assert sections("perplexity") == ["summary", "details"]
    assert sections("checkpoint") == ["summary", "steps", "errors", "details"]
    assert {"summary", "accuracy", "steps", "errors", "questions", "details"} <= set(sections("three"))
    assert "12.35" in parsed["perplexity"].of(**{"class": "figure"})[0]["text"]
    facts = [e["text"] for e in parsed["perplexity"].elements if e["tag"] == "dd"]
    assert {"vicuna-7b-f16, perplexity 12.10", "1.020 [1.010, 1.030]", "8.7 %"} <= set(facts)
    assert "mean 0.0321, median 0.0110, 99th percentile 0.410" in facts


def test_one_question_has_no_figure_that_is_none(parsed):
    page = parsed["one question"]
    (row,) = [e["text"] for e in page.elements if e["tag"] == "tr" and e["text"].startswith("abstract algebra")]
    assert row.startswith("abstract algebra\u00a01")
    assert not re.search(r"\b(nan|None|inf)\b", page.elements[0]["text"])


def test_axes_have_round_ends():
    assert scale_of([0.25, 0.93, 0.0, 1.0], low=0, high=1).ticks == (0, 0.25, 0.5, 0.75, 1)
    assert scale_of([0.31, 0.38]).ticks == (0.3, 0.32, 0.34, 0.36, 0.38)
    assert scale_of([-0.042, 0.013, None, float("nan")]).ticks[0] <= -0.042
    one = scale_of([0.5])
    assert one.low < 0.5 < one.high
    assert scale_of([]).ticks


def test_figures_are_set_as_people_write_them():
    assert [number(x) for x in (14042, 12.3456, 0.000012345, 0.5, None, float("inf"), "x")] == [
        "14\u202f042", "12.3", "1.23e-05", "0.500", "–", "inf", "x",
    ]  # fmt: skip
    assert [percent(x) for x in (0.4321, None, float("nan"))] == ["43.2", "–", "–"]
    assert [signed(x) for x in (0.012, -0.012, 0.0, -0.0001)] == ["+1.2", "−1.2", "0.0", "0.0"]
