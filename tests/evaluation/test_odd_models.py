"""Tokenizers without a beginning or an end, chat templates that fail: one line, or right scores."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from llmkit.errors import InputError
from tests.evaluation.running import evaluate

TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS
ROWS = [[f"Which {i}?", "apple", "stone", "None", "river", "ABCD"[i]] for i in range(3)]
BENCHES = {"mmlu": "virology", "ceval": "law", "cmmlu": "logical", "mini": "law_school"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    headers = {"ceval": ["id", "question", *"ABCD", "answer"], "cmmlu": ["", "Question", *"ABCD", "Answer"]}
    for bench, subject in BENCHES.items():
        for split in ("dev", "test", "val"):
            name = f"{subject}.csv" if bench == "cmmlu" else f"{subject}_{split}.csv"
            path = root / bench / split / name
            path.parent.mkdir(parents=True)
            rows = [headers[bench], *([str(i), *row] for i, row in enumerate(ROWS))] if bench in headers else ROWS
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
    return root


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    """Makes the tiny model with tokens left out of its tokenizer, or with a chat template."""

    def make(without=(), template=None):
        folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("odd") / "model")
        path = folder / "tokenizer_config.json"
        config = {k: v for k, v in json.loads(path.read_text()).items() if k not in without}
        path.write_text(json.dumps(config))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def hf_responses(folder, bench, data, **options):
    """What lm-eval's own `hf` backend answers to the same task."""
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    from llmkit.evaluation.benches import load_bench
    from llmkit.evaluation.csv_data import find_data
    from llmkit.evaluation.tasks import bench_task, quiet_lm_eval, set_shots

    known, subject = load_bench(bench), BENCHES[bench]
    task = bench_task(known, subject, find_data(known, data / bench).read(subject, shots=1))
    set_shots(task, 1)
    with quiet_lm_eval():
        done = lm_evaluate(
            HFLM(pretrained=str(folder), device="cpu", dtype="float32"),
            {"task": task},
            limit=2,
            log_samples=True,
            **options,
        )
    return [[r[0] for r in s["filtered_resps"]] for s in sorted(done["samples"]["task"], key=lambda s: s["doc_id"])]


def our_responses(folder, bench, data, **options):
    record = evaluate(folder, bench, data=data / bench, shots=1, limit=2, log_samples=True, **options)
    (samples,) = record.samples.values()
    return record, [[r[0] for r in s["responses"]] for s in samples]


@pytest.mark.parametrize("without", [["bos_token"], ["eos_token"]])
@pytest.mark.parametrize("bench", ["mmlu", "cmmlu"])
def test_a_tokenizer_without_a_beginning_or_an_end_token(model, data, without, bench):
    folder = model(without)
    _, ours = our_responses(folder, bench, data)
    for a, b in zip(ours, hf_responses(folder, bench, data), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("bench", BENCHES)
def test_a_tokenizer_with_neither_is_refused(model, data, bench):
    with pytest.raises(InputError, match="neither an end nor a beginning token"):
        evaluate(model(["bos_token", "eos_token"]), bench, data=data / bench, shots=1)


def test_a_template_without_a_system_role(model, data):
    folder = model(template=NO_SYSTEM)
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    for bench in BENCHES:
        record, ours = our_responses(folder, bench, data, chat_template=True)
        assert any("refuses a system message: prompts have no header" in w for w in record.warnings)
        if bench == "ceval":
            for a, b in zip(ours, hf_responses(folder, bench, data, **chat), strict=True):
                assert a == pytest.approx(b, abs=1e-4)
    record, _ = our_responses(model(template=TURNS), "mmlu", data, chat_template=True)
    assert not any("system message" in w for w in record.warnings)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content | nofilter }}", "refuses this conversation: No filter named 'nofilter'"),
        ("{{ raise_exception('never') }}", "the chat template refuses this conversation: never"),
        ("{% if %}", "the chat template refuses this conversation: Expected an expression"),
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_does_so_before_the_weights_are_read(model, data, monkeypatch, template, message):
    def refuse(*args):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("llmkit.evaluation.runner.open_engine", refuse)
    folder = model(template=template)
    for bench in BENCHES:
        with pytest.raises(InputError, match=message) as caught:
            evaluate(folder, bench, data=data / bench, shots=1, chat_template=True)
        assert "\n" not in caught.value.message


def test_a_template_without_a_place_for_the_question(model, data):
    folder = model(template="<user>")
    with pytest.raises(InputError, match="the chat template leaves the question out: it writes '<user>'"):
        evaluate(folder, "mmlu", data=data / "mmlu", shots=1, chat_template=True)
