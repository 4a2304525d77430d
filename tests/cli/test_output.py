"""The output object: each call in every mode; progress in a terminal and elsewhere; help that cannot go stale."""

from __future__ import annotations

import json
import re

import pytest

from llmkit.cli.output import Mode, Output, duration
from llmkit.cli.progress import Bar, Lines
from llmkit.pipeline.progress import NO_PROGRESS


def spoken(capsys, mode, action):
    capsys.readouterr()
    action(Output(mode))
    captured = capsys.readouterr()
    return captured.out, captured.err


TABLE = {
    "note": (lambda o: o.note("n"), ("", "n\n"), ("", ""), ("", "")),
    "hint": (lambda o: o.hint("h"), ("", "hint: h\n"), ("", ""), ("", "")),
    "warning": (lambda o: o.warning("w"), ("", "warning: w\n"), ("", "warning: w\n"), ("", "")),
    "error": (
        lambda o: o.error("input", "m", "h"),
        ("", "error: m\nhint: h\n"),
        ('{\n "error": {\n  "kind": "input",\n  "message": "m",\n  "hint": "h"\n }\n}\n', ""),
        ("", "error: m\nhint: h\n"),
    ),
    "answer": (
        lambda o: o.answer({"a": 1}, lambda: o.line("one"), "1"),
        ("one\n", ""),
        ('{\n "a": 1\n}\n', ""),
        ("1\n", ""),
    ),
}


@pytest.mark.parametrize("name", list(TABLE))
def test_every_call_in_every_mode(capsys, name):
    action, human, as_json, quiet = TABLE[name]
    assert spoken(capsys, Mode.HUMAN, action) == human
    assert spoken(capsys, Mode.JSON, action) == as_json
    assert spoken(capsys, Mode.QUIET, action) == quiet


def test_tables_outside_a_terminal_are_one_line_a_row(capsys):
    out, _ = spoken(capsys, Mode.HUMAN, lambda o: o.table(["name", "n"], [("a" * 300, 1), ("b", None)], right=["n"]))
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0] == "name" + " " * 296 + "  n"
    assert lines[2] == "a" * 300 + "  1"
    assert lines[3] == "b"


def test_records_align_and_indent(capsys):
    out, _ = spoken(capsys, Mode.HUMAN, lambda o: o.record({"a": 1, "long": "x\ny", "none": None}))
    assert out == "a     1\nlong  x\n      y\n"


def test_lines_come_each_tenth_or_half_minute():
    now = [0.0]
    said: list[str] = []
    lines = Lines(said.append, lambda: now[0])
    lines.begin(1000, "writing", "B")
    lines.advance(0)
    for _ in range(100):
        now[0] += 0.5
        lines.advance(10)
    assert len(said) == 10
    assert said[4] == "writing:  50% (500 B of 1 kB, 20 B/s, 0:25 left)"
    said.clear()
    lines.begin(1000, "scoring", "tokens")
    lines.advance(0)
    for _ in range(4):
        now[0] += 20
        lines.advance(10)
    assert said == [
        "scoring:   2% (20 of 1000 tokens, 0.5/s, 32:40 left)",
        "scoring:   4% (40 of 1000 tokens, 0.5/s, 32:00 left)",
    ]


def test_what_is_left_is_not_told_from_next_to_nothing():
    """A norm of 16 bytes is written, and then a block of matrices is computed for half a minute."""
    now, said = [0.0], list[str]()
    lines = Lines(said.append, lambda: now[0])
    lines.begin(119_000_000, "writing", "B")
    lines.advance(16)
    now[0] += 31
    lines.advance(16)
    assert said == ["writing:   0% (32 B of 119 MB, 1 B/s)"]


def test_quick_work_says_nothing():
    said: list[str] = []
    lines = Lines(said.append, lambda: 0.0)
    lines.begin(100, "writing")
    for _ in range(100):
        lines.advance(1)
    assert said == []


def test_progress_is_off_where_it_is_not_wanted(monkeypatch):
    monkeypatch.delenv("LLMKIT_NO_PROGRESS", raising=False)
    assert isinstance(Output().progress(), Lines)
    assert Output(Mode.JSON).progress() is NO_PROGRESS
    assert Output(Mode.QUIET).progress() is NO_PROGRESS
    monkeypatch.setenv("LLMKIT_NO_PROGRESS", "1")
    assert Output().progress() is NO_PROGRESS
    monkeypatch.delenv("LLMKIT_NO_PROGRESS")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(Output().progress(), Bar)


def test_a_bar_can_be_begun_again_and_ended_twice():
    bar = Bar()
    for unit in ("B", "tokens"):
        bar.begin(10, "work", unit)
        bar.advance(5, "x" * 100)
    bar.end()
    bar.end()
    bar.advance(1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.3, "12 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_every_command_has_help_examples_and_the_common_options(call):
    from llmkit.cli.reference import command_paths, help_text
    from llmkit.evaluation.scoring import BATCH_TOKENS

    paths = command_paths()
    groups = {p[:-1] for p in paths if p}
    assert ("delta", "apply") in paths
    for path in paths:
        text = help_text(path)
        assert text.startswith(f"Usage: llmkit {' '.join(path)}".strip()), path
        if path not in groups:
            assert f"Examples:\n    llmkit {' '.join(path)}" in text, path
            assert all(option in text for option in ("--json", "--quiet", "--verbose", "--help")), path
        if "--dry-run" in text:
            wanted = ["--output", "--overwrite", "--no-resume", "--workers"]
            # A decoded release has the files that were published, whatever their sizes.
            wanted += [] if path in (("delta", "xor"), ("delta", "decrypt")) else ["--max-shard-size", "--force"]
            assert all(option in text for option in wanted), path
    assert f"pass at most (default: {BATCH_TOKENS}, " in " ".join(help_text(("eval",)).split())


@pytest.mark.parametrize(("command", "first"), [("quantize", "--bits --format -o"), ("export", "--bits --dtype -o")])
def test_the_options_that_are_asked_for_stand_first_and_the_others_below_their_titles(command, first):
    from llmkit.cli.reference import help_text

    sections = re.findall(r"^(\w.*):\n((?:  .*\n|\n(?=  -))+)", help_text((command,)), re.M)
    options = {title: re.findall(r"^  (-\S+?),? ", text, re.M) for title, text in sections}
    assert [*options][-1] == "For every command"
    assert options["For every command"] == ["--json", "-q", "-v", "--plugin", "-h"]
    assert set(first.split()) <= set(options["Options"])
    assert len(options["Options"]) < 10
    assert options["Writing"][0] == "--dry-run"
    assert options["Grids and rounding"][0] == "--method"
    assert sum(map(len, options.values())) == len({o for listed in options.values() for o in listed})


def test_reference_replaces_only_its_part():
    from llmkit.cli.reference import markers, replaced

    begin, end = markers("reference")
    readme = f"# a\n\n{begin}\nold\n{end}\n\n## b\n"
    fresh = replaced(readme, "new")
    assert fresh == f"# a\n\n{begin}\n\nnew\n{end}\n\n## b\n"
    assert replaced(fresh, "new") == fresh
    assert replaced("# a\n", "new") == f"# a\n\n{begin}\n\nnew\n{end}\n"


def test_the_command_reference_is_fresh():
    from llmkit.cli.reference import COMMANDS, render, replaced

    page = COMMANDS.read_text(encoding="utf-8")
    assert replaced(page, render()) == page, "run: python -m llmkit.cli.reference"


def test_json_of_errors_is_one_document(call):
    assert json.loads(call("inspect", "--json").out)["error"]["kind"] == "usage"


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_bar_takes_one_line(monkeypatch, width):
    """A name that is cut is better than a bar of two lines, which flickers."""
    import io
    import re
    import sys

    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    bar = Bar()
    bar.begin(541_600_000, "writing mo4")
    bar.advance(323_300_000, "model.layers.3.self_attn.v_proj.weight_zeros")
    bar.end()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert lines
    assert all("writing mo4" in line for line in lines), lines
    assert all(len(line) <= width for line in lines)
    if width >= 80:
        assert "323.3/541.6 MB" in lines[-1]
        assert lines[-1].rstrip().endswith("v_proj.weight_zeros"[-10:])
