"""MMLU-Pro over its published Parquet files."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest
from tiny_model import save_tiny_llama
from tiny_tokenizer import train_tokenizer

from llmkit.errors import InputError
from llmkit.evaluation.scoring import Scorer
from tests.evaluation.running import evaluate


def record(i, category, **changed):
    options = [f" option {i} {x}" for x in range(3 + i)]
    body = {
        "question_id": i,
        "question": f"Which {i}?",
        "options": options,
        "answer": "ABCDEFGHIJ"[i],
        "answer_index": i,
        "cot_content": f"A: Let's think step by step. It is {i}. The answer is ({'ABCDEFGHIJ'[i]}).",
        "category": category,
        "src": "made",
    }
    return body | changed


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder, max_length=3000)
    train_tokenizer(folder)
    return folder


def test_prompts_and_answers_of_two_categories(model, tmp_path, monkeypatch):
    write(
        tmp_path / "MMLU-Pro" / "data",
        validation=[record(i, c) for i in range(2) for c in ("math", "computer science")],
        test=[record(i, c) for i in range(7) for c in ("law", "computer science")],
    )
    sent = []

    def generate(self, requests, encoder, eos_ids):
        assert {r.max_new for r in requests} == {2048}
        assert all("Question:" in r.stops for r in requests)
        sent.extend(encoder.decode(r.tokens) for r in requests)
        return [f"It is so. The answer is ({x})" for x in "ABCJEF"] + ["I cannot say."]

    monkeypatch.setattr(Scorer, "generate", generate)
    run = evaluate(model, "mmlu_pro", data=tmp_path, shots=2, subjects=["computer_science"])
    bench = run.benches["mmlu_pro"]
    (subject,) = bench.subjects
    assert "".join(q.target for q in subject.questions) == "ABCDEFG"
    assert [q.choice for q in subject.questions] == [*"ABCJEF", ""]
    assert subject.acc.value == pytest.approx(5 / 7)
    assert (bench.protocol, bench.average, bench.title, len(bench.missing)) == ("lm-eval", "micro", "MMLU-Pro", 13)

    def block(i):
        lines = "".join(f"{'ABCDEFGHIJ'[x]}. option {i} {x}\n" for x in range(3 + i))
        return f"Question:\nWhich {i}?\nOptions:\n{lines}Answer: Let's think step by step."

    head = "The following are multiple choice questions (with answers) about computer science. Think step by step and "
    assert sent[6].startswith(head)
    assert sent[6].endswith(f"{block(1)} It is 1. The answer is (B).\n\n{block(6)}")
    assert sent[6].count("Question:") == 3
    again = evaluate(model, "mmlu_pro", data=tmp_path, shots=2, subjects=["computer_science"])
    assert again.benches["mmlu_pro"].task_digest == bench.task_digest


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": "K"}, "row 2, column answer: the answer is 'K', expected A to C"),
        ({"answer": ""}, "row 2, column answer: the answer is ''"),
        ({"options": ["only"]}, "row 2, column options: 1 options, expected 2 to 10"),
        ({"options": None}, "row 2, column options: expected a list of texts, found None"),
        ({"question": None}, "row 2, column question: expected a text"),
    ],
)
def test_what_is_no_question(tmp_path, changed, message):
    write(tmp_path, test=[record(1, "law"), record(0, "law", **changed)], validation=[record(0, "law")])
    with pytest.raises(InputError) as caught:
        evaluate("/nowhere", "mmlu_pro", data=tmp_path, shots=0, subjects=["law"])
    assert message in caught.value.message


def test_other_parquet_files_are_refused(tmp_path):
    write(tmp_path, test=[{"question": "Which?", "choices": ["a", "b"], "answer": 1}])
    with pytest.raises(InputError, match="the column category is missing; found question, choices, answer"):
        evaluate("/nowhere", "mmlu_pro", data=tmp_path, shots=0, subjects=["law"])
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a Parquet file"):
        evaluate("/nowhere", "mmlu_pro", data=tmp_path, shots=0, subjects=["law"])
