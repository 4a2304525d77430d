"""The demo's accuracies are those that plain torch and peft gave when the mini model was made."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest


@pytest.mark.slow
def test_accuracies_mean_something(call, tmp_path):
    figures = json.loads((files("llmkit_evalsets") / "mini" / "figures.json").read_text(encoding="utf-8"))["models"]
    done = call("demo", "--json", "--keep", tmp_path / "kept")
    assert done.code == 0, done.err
    found = {row["model"]: row for row in done.document["models"]}
    for name, recorded in {"base": "base", "+ delta": "tuned", "+ adapter": "adapter"}.items():
        for subject, accuracy in figures[recorded]["by_subject"].items():
            # One question of 80 may be a tie that another order of sums breaks.
            assert abs(100 * found[name]["subjects"][subject] - accuracy) <= 1.26, (name, subject)
    accuracy = {name: row["accuracy"] for name, row in found.items()}
    assert accuracy["base"] > 0.25 + 0.15
    assert accuracy["+ delta"] > accuracy["base"] + 0.1
    assert accuracy["+ adapter"] > accuracy["+ delta"] + 0.05
    assert abs(accuracy["int8"] - accuracy["+ adapter"]) <= 0.01
    assert found["+ delta"]["subjects"]["star_lore"] < 0.35
    assert found["+ adapter"]["subjects"]["star_lore"] > 0.8
    assert (tmp_path / "kept" / "int4" / "llmkit.json").is_file()
