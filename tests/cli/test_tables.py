"""Tables in a window: nothing is lost, numbers stay whole, and lines fit where they can."""

from __future__ import annotations

from llmkit.cli.tables import aligned

NAMES = ["  high_school_government_and_politics", "  world_religions", "all questions"]
COLUMNS = ["mmlu", "before", "95 % interval", "to wrong"]
ROWS = [(name, "0.8000", "-0.3920 to +0.3920", "10") for name in NAMES]


def test_a_narrow_window_folds_headers_and_names_and_no_number():
    lines = list(aligned(COLUMNS, ROWS, COLUMNS[1:], 56))
    assert lines == [
        "mmlu                   before       95 % interval     to",
        "                                                   wrong",
        "─────────────────────  ──────  ──────────────────  ─────",
        "  high_school_         0.8000  -0.3920 to +0.3920     10",
        "  government_and_",
        "  politics",
        "  world_religions      0.8000  -0.3920 to +0.3920     10",
        "all questions          0.8000  -0.3920 to +0.3920     10",
    ]


def test_a_window_that_is_wide_enough_or_too_small_for_the_numbers():
    plain = list(aligned(COLUMNS, ROWS, COLUMNS[1:]))
    assert plain == list(aligned(COLUMNS, ROWS, COLUMNS[1:], 200))
    assert len(plain) == 2 + len(ROWS)
    for window in (1, 40):
        text = "\n".join(aligned(COLUMNS, ROWS, COLUMNS[1:], window))
        assert text.count("-0.3920 to +0.3920") == len(ROWS)
        assert "".join(NAMES[0].split()) in "".join(line[:16].strip() for line in text.split("\n"))


def test_ideographs_take_two_places():
    lines = list(aligned(["题目", "n"], [("法律", "1"), ("law", "22")], ["n"]))
    assert lines == ["题目   n", "────  ──", "法律   1", "law   22"]
    assert list(aligned(["a"], [("法" * 12,)], [], 17))[2:] == ["法" * 8, "法" * 4]
