"""`report` and the thresholds of `eval`, called as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llmkit.evaluation.benches import load_bench

MINI = load_bench("mini").own_data
SUBJECTS = ("forge_craft", "star_lore")


def write_record(path: Path, label: str, **choices: str) -> Path:
    """A record whose right answers are all A."""
    subjects = {
        name: {"n": len(c), "acc": c.count("A") / len(c), "stderr": 0.1, "choices": c, "targets": "A" * len(c)}
        for name, c in choices.items()
    }
    bench = {"title": "mini", "subjects": subjects, "missing": [], "shots": 2}
    document = {
        "format": "llmkit.eval/1", "created": "2026-01-02", "model": {"label": label}, "settings": {}, "versions": {},
        "benches": {"mini": bench}, "elapsed_s": 1.5,
    }  # fmt: skip
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """A baseline, one that is surely worse, one that may be."""
    rows = {
        "good": ("A" * 40, "A" * 40),
        "bad": ("B" * 12 + "A" * 28, "B" * 9 + "A" * 31),
        "near": ("B" + "A" * 39,) * 2,
    }
    return [write_record(tmp_path / f"{k}.json", k, forge_craft=a, star_lore=b) for k, (a, b) in rows.items()]


def test_several_runs_are_compared_with_the_first(call, runs):
    shown = call("report", *runs)
    assert shown.code == 0
    assert "bad is worse than good by 26.2 points on mini, 95 % interval -3" in shown.out
    assert "; 21 questions flipped to wrong, 0 to right\n" in shown.out
    assert "near is tied with good on mini (-2.5 points" in shown.out
    assert "wrong to wrong 0, McNemar p 9.5e-07 (1.9e-06 by Holm)" in shown.out
    document = call("report", *runs, "--json").document
    assert [c["run"] for c in document["comparisons"]] == ["bad", "near"]
    assert document["comparisons"][0]["flips"] == {"to_wrong": 21, "to_right": 0, "wrong_to_wrong": 0}
    assert call("report", *runs[:2], "-q").out.count("\n") == 1


def test_runs_of_one_name_are_called_by_their_files(call, tmp_path):
    paths = [write_record(tmp_path / name, "m", star_lore="AB") for name in ("a.json", "b.json")]
    shown = call("report", *paths)
    assert f"{paths[1]} answers all 2 questions of mini as {paths[0]} does" in shown.out


@pytest.mark.parametrize(
    ("which", "options", "code", "said"),
    [
        ((0, 1), ["--max-drop", "0.01"], 1, "mini micro: bad against good -0.2625, allowed are -0.01"),
        ((0, 1), ["--max-drop", "0.3"], 0, ""),
        ((0, 2), ["--max-drop", "0.01"], 0, ""),
        ((0, 2), ["--max-drop", "0.01", "--strict"], 1, "-0.0250, not significant, allowed are -0.01"),
        ((0, 1), ["--max-drop", "mini:macro=0.2"], 1, "mini macro: bad against good"),
        ((0, 1, 2), ["--fail-under", "0.9"], 1, "mini micro 0.7375 is below 0.9"),
        ((0,), ["--fail-under", "mini=0.9"], 0, ""),
        ((0,), ["--max-drop", "0.01"], 2, "--max-drop is not for a run without a baseline"),
        ((0, 1), ["--strict"], 2, "--strict is about --max-drop"),
        ((0, 1), ["--max-drop", "mimi=0.01"], 2, "mimi is not scored; scored are mini"),
        ((0, 1), ["-o", "x.html", "--max-drop", "0.01"], 2, "--max-drop is not for report -o"),
        ((0, 1), ["--junit", "nowhere/x.xml"], 2, "folder nowhere does not exist"),
    ],
)
def test_thresholds_decide_the_exit_code(call, runs, which, options, code, said):
    result = call("report", *(runs[i] for i in which), *options)
    assert result.code == code
    assert said in result.err


def test_runs_that_do_not_match_are_refused_until_told_otherwise(call, runs, tmp_path):
    other = write_record(tmp_path / "other.json", "other", star_lore="A" * 40)
    result = call("report", runs[0], other)
    assert result.code == 2
    assert "40 in both, 40 only in good (forge_craft 40)" in result.err
    assert "hint: compare those that both have: --common" in result.err
    result = call("report", runs[0], other, "--common")
    assert result.code == 0
    assert "mini: 40 questions that only one of two runs has are left out" in result.err


def check_junit(path: Path) -> ElementTree.Element:
    """The rules that CI systems' readers share: counts that hold, names, and a message in each failure."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    for suite in root:
        assert suite.tag == "testsuite"
        assert int(suite.attrib["tests"]) == len(suite)
        assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
        float(suite.attrib["time"])
        names = [case.attrib["name"] for case in suite]
        assert len(set(names)) == len(names)
        for case in suite:
            assert case.tag == "testcase"
            assert case.attrib["classname"]
            assert {child.tag for child in case} <= {"failure", "system-out"}
            assert all(failure.attrib["message"] for failure in case.findall("failure"))
    assert int(root.attrib["tests"]) == sum(len(suite) for suite in root)
    assert int(root.attrib["failures"]) == len(root.findall("testsuite/testcase/failure"))
    return root


def test_junit_has_a_case_for_each_subject_and_threshold(call, runs, tmp_path):
    out = tmp_path / "junit.xml"
    assert call("report", *runs[:2], "--max-drop", "0.01", "--fail-under", "0.5", "--junit", out).code == 1
    (suite,) = check_junit(out)
    cases = {case.attrib["name"]: case for case in suite}
    expected = ["forge_craft", "star_lore", "bad against good", "mini micro", "mini micro: bad against good"]
    assert list(cases) == expected
    failed = [name for name, case in cases.items() if case.find("failure") is not None]
    assert failed == ["mini micro: bad against good"]
    assert cases["star_lore"].find("system-out").text == "accuracy 0.7750 of 40 questions"
    assert call("report", *runs[:2], "--junit", out).code == 0  # an older one is replaced
    assert check_junit(out).attrib["failures"] == "0"
    (tmp_path / "notes.xml").write_text("<notes/>")
    result = call("report", runs[0], "--junit", tmp_path / "notes.xml")
    assert result.code == 2
    assert "already exists and is not a JUnit file" in result.err


def test_junit_of_names_that_xml_cannot_hold(call, tmp_path):
    path, out = write_record(tmp_path / "run.json", "m", **{"a\x01<b>&": "AB"}), tmp_path / "junit.xml"
    assert call("report", path, "--junit", out).code == 0
    assert check_junit(out)[0][0].attrib["name"] == "a<b>&"


@pytest.fixture(scope="module")
def base_run(tmp_path_factory) -> Path:
    from llmkit.cli.app import main

    path = tmp_path_factory.mktemp("base") / "base.json"
    assert main(["eval", str(MINI / "base"), *SCORED, "-q", "-o", str(path)]) == 0
    return path


SCORED = ("--bench", "mini", "--subjects", ",".join(SUBJECTS), "--limit", "20")


def test_eval_compares_with_a_baseline(call, base_run, tmp_path):
    out = tmp_path / "junit.xml"
    gates = ("--compare", base_run, "--max-drop", "0.01", "--fail-under", "mini:macro=0.1", "--junit", out)
    same = call("eval", MINI / "base", *SCORED, *gates)
    assert same.code == 0
    assert "answers all 40 questions of mini as" in same.out
    assert "over subjects (macro)" in same.out
    assert len(check_junit(out)[0]) == 5
    document = call("eval", MINI / "base", *SCORED, *gates, "--json").document
    assert document["comparisons"][0]["flips"] == {"to_wrong": 0, "to_right": 0, "wrong_to_wrong": 0}
    assert [gate["passed"] for gate in document["gates"]] == [True, True]


def test_eval_fails_under_a_named_average(call):
    result = call("eval", MINI / "base", *SCORED, "--fail-under", "mini:macro=0.99", "-q")
    assert result.code == 1
    assert "is below 0.99" in result.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-drop", "0.01"], "--max-drop is not for a run without a baseline"),
        (["--fail-under", "mmlu=0.4"], "mmlu is not scored; scored are mini"),
        (["--fail-under", "45"], "expected a share from 0 to 1"),
        (["--compare", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_mistakes_in_thresholds_are_found_before_the_model_is_opened(call, options, said):
    result = call("eval", "/nowhere", "--bench", "mini", *options)
    assert result.code == 2
    assert said in result.err
    assert "hint: " in result.err


def test_a_baseline_of_another_benchmark_is_found_before_the_model_is_opened(call, runs):
    result = call("eval", "/nowhere", "--bench", "mmlu", "--compare", runs[0])
    assert result.code == 2
    assert f"{runs[0]} has no mmlu" in result.err
