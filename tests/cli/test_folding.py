"""Names that differ in numbers alone share a line."""

from __future__ import annotations

from llmkit.cli.folding import fold_lines


def test_layers_are_folded_and_numbers_within_words_are_not():
    names = ["embed.weight", *(f"layers.{i}.{w}.weight" for i in range(3) for w in ("w1", "w2")), "norm.weight"]
    assert fold_lines((n, "") for n in names) == [
        "embed.weight",
        "layers.N.w1.weight  (N = 0..2)",
        "layers.N.w2.weight  (N = 0..2)",
        "norm.weight",
    ]


def test_what_is_said_of_names_must_be_alike_and_gaps_are_counted():
    entries = [("h.0.w", ": [2]"), ("h.1.w", ": [3]"), ("h.4.w", ": [3]"), ("h.5.0.e", ""), ("h.5.1.e", "")]
    assert fold_lines(entries) == ["h.0.w: [2]", "h.N.w: [3]  (N = 1..4, 2 tensors)", "h.N.N.e  (N = 5..5, 2 tensors)"]
