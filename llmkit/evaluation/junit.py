"""JUnit XML, as the CI systems read it: a suite a benchmark, a test case a subject and a gate.

The elements and attributes are the subset that Jenkins, GitLab and GitHub's reporters share (testmoapp/junitxml).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from llmkit.evaluation.comparison import Comparison
from llmkit.evaluation.gates import Gate
from llmkit.evaluation.record import RunRecord
from llmkit.pipeline.files import check_file, write_file

_KIND = "a JUnit file"
_NOT_XML = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF, *range(0xD800, 0xE000)])


@dataclass(frozen=True, slots=True)
class Case:
    """A test case.

    Attributes:
        output: what it says beside its result.
        failure: why it failed; None where it passed.
    """

    name: str
    output: str = ""
    failure: str | None = None


def score_cases(record: RunRecord) -> dict[str, list[Case]]:
    """The subjects of each benchmark, and each task, of a run."""
    cases = {
        name: [Case(s.name, f"accuracy {s.acc.value:.4f} of {s.acc.n} questions") for s in result.subjects]
        for name, result in record.benches.items()
    }
    return cases | {
        name: [Case(name, f"score {record.scores[name]:.4f}" * (name in record.scores))] for name in record.tasks
    }


def comparison_cases(comparisons: Sequence[Comparison]) -> dict[str, list[Case]]:
    """The sentence of each comparison."""
    cases: dict[str, list[Case]] = {}
    for each in comparisons:
        cases.setdefault(each.bench, []).append(Case(f"{each.label} against {each.baseline}", each.sentence))
    return cases


def junit_xml(cases: Mapping[str, Sequence[Case]], gates: Sequence[Gate], elapsed_s: Mapping[str, float]) -> bytes:
    """The document.

    Args:
        cases: by benchmark or task.
        gates: thresholds that were checked; one that was not kept is a failure.
        elapsed_s: seconds by benchmark; 0 where unknown.
    """
    root = ElementTree.Element("testsuites", name="llmkit")
    n_all = n_failed = 0
    for bench in dict.fromkeys([*cases, *(g.bench for g in gates)]):
        checked = [Case(g.name, g.message, None if g.passed else g.message) for g in gates if g.bench == bench]
        some = [*cases.get(bench, ()), *checked]
        failed = sum(case.failure is not None for case in some)
        n_all, n_failed = n_all + len(some), n_failed + failed
        counts = {"tests": str(len(some)), "failures": str(failed), "errors": "0", "skipped": "0"}
        times = {"time": f"{elapsed_s.get(bench, 0):.3f}"}
        suite = ElementTree.SubElement(root, "testsuite", {"name": _text(bench)} | counts | times)
        for case in some:
            element = ElementTree.SubElement(
                suite, "testcase", name=_text(case.name), classname=_text(f"llmkit.{bench}"), time="0"
            )
            if case.failure is not None:
                ElementTree.SubElement(element, "failure", message=_text(case.failure), type="threshold")
            if case.output:
                ElementTree.SubElement(element, "system-out").text = _text(case.output)
    root.attrib |= {
        "tests": str(n_all),
        "failures": str(n_failed),
        "errors": "0",
        "time": f"{sum(elapsed_s.values()):.3f}",
    }
    ElementTree.indent(root, " ")
    text: str = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'.encode()


def check_junit_path(path: Path) -> None:
    """Refuse a path where the file cannot be written, or where another one lies.

    Raises:
        OutputError: saying what is there.
    """
    check_file(path, _KIND, _is_junit)


def write_junit(path: Path, data: bytes) -> None:
    """Write the document; whole or not at all.

    Raises:
        OutputError: see `check_junit_path`; or the disk is full.
    """
    write_file(path, data, _KIND, _is_junit)


def _is_junit(head: bytes) -> bool:
    return b"<testsuite" in head or not head


def _text(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold."""
    return text.translate(_NOT_XML)
