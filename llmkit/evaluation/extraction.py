"""Letters read out of generated answers, by the rules of the published scripts.

Each function takes the answer's text and gives A, B, C or D, or an empty string where its rules find none. (Where a
script draws a letter then, the draw is left out: see `llmkit.evaluation.protocols`.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import punctuation

from llmkit.evaluation.documents import FOUR, LETTERS

# hkust-nlp/ceval, code/evaluator_series/evaluators/llama.py: the first pattern that is anywhere in the text decides
_THOUGHT = re.compile(r"让我们一步一步思考[\s\S]+?(?=让我们一步一步思考|$)")
_CEVAL_COT = [
    re.compile(pattern)
    for pattern in (
        r"答案是?\s?([ABCD])",
        r"答案是?\s?：([ABCD])",
        r"答案是?\s?:([ABCD])",
        r"答案应该?是\s?([ABCD])",
        r"答案应该?选\s?([ABCD])",
        r"答案为\s?([ABCD])",
        r"选择\s?([ABCD])",
        r"只有选?项?\s?([ABCD])\s?是?对",
        r"只有选?项?\s?([ABCD])\s?是?错",
        r"只有选?项?\s?([ABCD])\s?不?正确",
        r"只有选?项?\s?([ABCD])\s?错误",
        r"说法不?对选?项?的?是\s?([ABCD])",
        r"说法不?正确选?项?的?是\s?([ABCD])",
        r"说法错误选?项?的?是\s?([ABCD])",
        r"([ABCD])\s?是正确的",
        r"([ABCD])\s?是正确答案",
        r"选项\s?([ABCD])\s?正确",
        r"所以答\s?([ABCD])",
        r"1.\s?([ABCD])[.。$]?$",
        r"所以\s?([ABCD][.。$]?$)",
        r"所有\s?([ABCD][.。$]?$)",
        r"[\s，：:,]([ABCD])[。，,\.]?$",
        r"[\s，,：:][故即]([ABCD])[。\.]?$",
        r"[\s，,：:]因此([ABCD])[。\.]?$",
        r"[是为。]\s?([ABCD])[。\.]?$",
        r"因此\s?([ABCD])[。\.]?$",
        r"显然\s?([ABCD])[。\.]?$",
        r"1.\s?(.*?)$",
        r"答案是\s?(\S+)(?:。|$)",
        r"答案应该是\s?(\S+)(?:。|$)",
        r"答案为\s?(\S+)(?:。|$)",
    )
]

# hkust-nlp/ceval, code/evaluator_series/evaluators/chatglm.py, and from there
# ymcui/Chinese-LLaMA-Alpaca, scripts/ceval/llama_evaluator.py
_STATED = [
    re.compile(pattern)
    for pattern in (
        r"([ABCD])是正确的",
        r"选项([ABCD])正确",
        r"答案为([ABCD])",
        r"答案是([ABCD])",
        r"答案([ABCD])",
        r"选择([ABCD])",
        r"答案：([ABCD])",
        r"选择答案([ABCD])",
    )
]

# haonan-li/CMMLU, src/mp_utils.py: the group that holds the letter is the last one, but where a number says otherwise
_CMMLU = [
    re.compile(pattern)
    for pattern in (
        r"答案(?:选项)?(?:是|为)：? ?([ABCD])",
        r"答案(?:是|为)选项 ?([ABCD])",
        r"故?选择?：? ?([ABCD])",
        r"([ABCD]) ?选?项(?:是|为)?正确",
        r"正确的?选项(?:是|为) ?([ABCD])",
        r"答案(?:应该)?(?:是|为)([ABCD])",
        r"选项 ?([ABCD]) ?(?:是|为)?正确",
        r"选择答案 ?([ABCD])",
        r"答案?：?([ABCD])",
        r"([ABCD])(?:选?项)?是?符合题意",
        r"答案选项：? ?([ABCD])",
        r"答案(?:选项)?为(?:.*?)([ABCD])",
    )
]
_CMMLU_LAST = [re.compile(r"([ABCD]).*?当选"), re.compile(r"([ABCD]).*?正确")]
_CMMLU_WEAK = re.compile(r"[^不]是：? ?([ABCD])")
_CMMLU_ONLY = re.compile(r"[^ABCD]*([ABCD])[^ABCD]*$")


def of_ceval_reasoning(text: str, choices: Sequence[str], target: str = "") -> str:
    """The letter in a chain of thought, as C-Eval's script for LLaMA reads it.

    Args:
        text: from the words that begin the chain of thought on.
        choices: the texts of A to D: an answer may be one of them in full.
        target: the right letter, which counts where several choices have one text.
    """
    thought = _THOUGHT.search(text)
    found = next((m[1] for m in (p.search(thought[0]) for p in _CEVAL_COT) if m), "") if thought else ""
    if found in FOUR:
        return found
    same = [letter for letter, choice in zip(FOUR, choices, strict=False) if found and choice == found]
    return target if target in same else (same[0] if same else "")


def of_ceval_chat(text: str, choices: Sequence[str]) -> str:
    """The letter of a chat model's answer, as C-Eval's script for ChatGLM reads it.

    Patterns in their order, then the only letter, then the only choice whose text occurs.
    """
    if stated := _stated(text):
        return stated
    for found in (
        re.findall(r"[ABCD]", text),
        [letter for letter, choice in zip(FOUR, choices, strict=False) if choice in text],
    ):
        if len(found) == 1:
            return found[0]
    return ""


def of_alpaca(text: str, choices: Sequence[str]) -> str:
    """The letter of a short answer, as Chinese-LLaMA-Alpaca's script reads it.

    Patterns in their order, then the first letter, then the first text of a choice.
    """
    if stated := _stated(text) or "".join(re.findall(r"[ABCD]", text))[:1]:
        return stated
    letter_of = dict(zip(choices, FOUR, strict=False))  # the last of equal ones
    match = re.search("|".join(re.escape(choice) for choice in choices), text)
    return letter_of[match[0]] if match else ""


def _stated(text: str) -> str:
    answers = re.findall(r"所以答案是(.+?)。", text)
    if answers and answers[-1] in FOUR:
        return str(answers[-1])
    return next((match[1] for match in (pattern.search(text) for pattern in _STATED) if match), "")


def of_cmmlu_reasoning(text: str) -> str:
    """The letter of a free answer, as CMMLU's script reads it; line breaks are left out before."""
    text = text.replace("\n", "")
    if text[:1] in FOUR:
        return text[0]
    for pattern in _CMMLU:
        if match := pattern.search(text):
            return match[1]
    for pattern in _CMMLU_LAST:
        if match := pattern.search(text):
            while match:
                letter = match[1]
                match = pattern.search(match[0][1:])
            return letter
    match = _CMMLU_WEAK.search(text) or _CMMLU_ONLY.match(text)
    return match[1] if match else ""


def matched_letter(text: str, right: str, *, is_match: bool) -> str:
    """The letter that lm-eval's exact match takes an answer for: it looks at neither case nor punctuation.

    Args:
        text: the answer as the task's filters leave it.
        right: the right letter.
        is_match: what exact match says; the answer counts as the right letter then, whatever it looks like.
    """
    if is_match:
        return right
    letter = text.strip(punctuation).strip().upper()
    return letter if letter in set(LETTERS) - {right} else ""
