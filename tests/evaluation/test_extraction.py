"""Letters in generated answers are those that the published scripts read, on 4,000 made-up answers."""

from __future__ import annotations

import hashlib
import random

import pytest

from llmkit.evaluation import extraction

WORDS = (
    "答案 是 为 ： : ， 。 . , 选项 选择 选 正确 的 正确答案 A B C D E 所以 因此 显然 故 即 只有 说法 不 对 错 错误 "
    "应该 应 1. 2. 让我们一步一步思考 符合题意 当选 是正确的 是正确答案 甲 乙丙 丁 所有 答 不正确 (A) abc 0.5"
)
ATOMS = [*WORDS.split(), "\n", "\n", " ", ""]
CHOICES = (["甲", "乙丙", "丁", "0.5"], ["甲", "甲", "丁", "乙丙"])
LEAD = "让我们一步一步思考，\n1."

# sha256 of the letters that the scripts themselves gave, one a line (for C-Eval: the letters that would be right):
# hkust-nlp/ceval cba65ae, ymcui/Chinese-LLaMA-Alpaca 090475f, haonan-li/CMMLU d6e7b71
RECORDED = {
    "ceval": "e870057f8ac82938377650270b8ae803940268a05a21cdd61ec3a5e529f81b95",
    "chat": "8806a2c55155939dcbd0a4c549e6a87de022bc3e930236699ed3bb8a880829f0",
    "alpaca": "3d5257dbeb9fdee27dc959d0251d8d9d4b7f3ac4b2b56a3d05306746b3806028",
    "cmmlu": "468490e917acce5fa4a5baed7ef4698ab91c60f715d63e400a61f0f2e729ae6c",
}


def answers():
    """Answers of random words, and the choices of each."""
    rng = random.Random(14)
    for _ in range(4000):
        text = "".join(rng.choice(ATOMS) for _ in range(rng.randint(1, 14)))
        yield text, rng.choice(CHOICES)


def right_ones(text, choices):
    return "".join(x for x in "ABCD" if extraction.of_ceval_reasoning(LEAD + text, choices, x) == x)


READERS = {
    "ceval": right_ones,
    "chat": extraction.of_ceval_chat,
    "alpaca": extraction.of_alpaca,
    "cmmlu": lambda text, choices: extraction.of_cmmlu_reasoning(text),
}


@pytest.mark.parametrize("name", RECORDED)
def test_letters_are_those_of_the_published_scripts(name):
    letters = "\n".join(READERS[name](*answer) for answer in answers())
    assert hashlib.sha256(letters.encode()).hexdigest() == RECORDED[name]


@pytest.mark.parametrize(
    ("text", "ceval", "alpaca", "cmmlu"),
    [
        ("甲是对的。\n所以答案是B。", "B", "B", "B"),
        ("C", "C", "C", "C"),
        ("答案为丁", "", "C", ""),
        ("A项不对，B项正确", "", "A", "A"),
        ("A或B都可以", "", "A", "A"),
        ("不知道", "", "", ""),
        ("", "", "", ""),
        ("选择A。让我们一步一步思考，答案是B", "A", "B", "B"),
    ],
)
def test_some_answers(text, ceval, alpaca, cmmlu):
    choices = CHOICES[0]
    assert extraction.of_ceval_reasoning(LEAD + text, choices) == ceval
    assert extraction.of_alpaca(text, choices) == alpaca
    assert extraction.of_cmmlu_reasoning(text) == cmmlu
