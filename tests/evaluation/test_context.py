"""Prompts longer than the context are told in numbers before anything is scored; the numbers are the tokenizer's."""

from __future__ import annotations

import csv

import pytest
from tiny_model import save_tiny_llama
from tiny_tokenizer import train_tokenizer

from tests.evaluation.running import evaluate

SUBJECTS = {"anatomy": 1, "virology": 6}  # how long its questions are


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder, max_length=1000)
    train_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, n in (("dev", 3), ("test", 4)):
        (root / split).mkdir()
        for subject, length in SUBJECTS.items():
            with (root / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(
                    [f"Which of {'these ' * length * (i + 1)}?", "apple", "0.50", "None", "river", "A"]
                    for i in range(n)
                )
    return root


def lengths(folder, data, subject, shots):
    """Tokens that the model takes for each question, by the tokenizer alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rows(split):
        with (data / split / f"{subject}_{split}.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    def block(row):
        return f"{row[0].strip()}\nA. {row[1]}\nB. {row[2]}\nC. {row[3]}\nD. {row[4]}\nAnswer:"

    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    head += "".join(f"{block(row)} {row[5]}\n\n" for row in rows("dev")[:shots])
    return [max(len(tokenizer(f"{head}{block(row)} {x}")["input_ids"]) for x in "ABCD") - 1 for row in rows("test")]


def told(folder, data, **options):
    lines, scored = [], []

    def tell(line):
        assert not scored
        lines.append(line)

    record = evaluate(folder, "mmlu", data=data, tell=tell, limit=1, **options)
    scored.append(record)
    return lines


def test_the_subject_the_tokens_and_the_shots_that_fit(folder, data):
    need = {k: max(lengths(folder, data, "virology", k)) for k in range(4)}
    assert max(lengths(folder, data, "anatomy", 3)) < need[2]
    (line,) = told(folder, data, shots=3, max_length=need[3] - 1)
    assert line == (
        f"MMLU: prompts with 3 shots need up to {need[3]} tokens, the model takes {need[3] - 1}: they lose their "
        "beginning in virology; --shots 2 fits"
    )
    (line,) = told(folder, data, shots=3, max_length=need[1])
    assert line.endswith("; --shots 1 fits")
    (line,) = told(folder, data, shots=1, max_length=need[0] - 1)
    assert line.endswith("; even --shots 0 does not fit")
    assert told(folder, data, shots=3, max_length=need[3]) == []
    assert told(folder, data, shots=3) == []


def test_a_protocol_that_leaves_shots_out_has_nothing_to_tell(folder, data):
    need = max(lengths(folder, data, "virology", 3))
    assert told(folder, data, shots=3, max_length=need - 20, protocol="original") == []
