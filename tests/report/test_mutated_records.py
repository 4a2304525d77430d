"""Records that are not as llmkit writes them: every form is written of them, or they are refused in a line."""

from __future__ import annotations

import copy
import json
import random

import pytest
import report_world as world

from llmkit.errors import LlmkitError
from llmkit.evaluation.formats.format import formats
from llmkit.evaluation.report_inputs import read_inputs

VALUES = [None, 0, -1, 1e308, True, "", "x", [], {}, [None], ["x", 1], {"a": None}, float("nan"), "\0"]


def places(body, path=()):
    """Every place in a document, by keys."""
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(body, path, value):
    body = copy.deepcopy(body)
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return body


@pytest.mark.parametrize("kind", ["record", "text", "answer"])
def test_a_changed_document_is_reported_or_refused(kind, tmp_path):
    record = world.run("a", world.mmlu(seed=1, only=2, n=2), history=("delta",), samples=True).to_json()
    record["tasks"] = {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1, "version": "1", "shots": 0}}
    text = {"perplexity": 9.5, "nll": 2.25, "stderr": 0.1, "n_scored": 100, "elapsed_s": 1.0}
    text["model"] = record["model"]
    answer = {
        "out": "/models/a",
        "recipe": [{"transform": "quantize"}],
        "sizes": {"after_nbytes": 10, "bits_per_weight": 4.5},
        "errors": {"model.layers.0.q.weight": 0.1},
        "evaluation": {"perplexity_before": 1.0, "perplexity_after": 2.0},
    }
    whole = json.loads(json.dumps({"record": record, "text": text, "answer": answer}[kind]))
    rng = random.Random(5)
    known, said = formats(), []
    path, second = tmp_path / "a.json", tmp_path / "b.json"
    second.write_text(json.dumps(record))
    everywhere = list(places(whole))
    for place in rng.sample(everywhere, min(40, len(everywhere))):
        path.write_text(json.dumps(changed(whole, place, rng.choice(VALUES))))
        try:
            inputs = read_inputs([path, second])
        except LlmkitError as error:
            said.append(error.message)
            continue
        for form in known.values():
            try:
                form.render(inputs)
            except LlmkitError as error:
                said.append(error.message)
    assert said
    assert not [message for message in said if "\n" in message]
