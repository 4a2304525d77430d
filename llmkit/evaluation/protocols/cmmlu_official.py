"""CMMLU as its authors score it: haonan-li/CMMLU, src/hf_causal_model.py and src/mp_utils.py.

The most probable of the letters as the next token, each by the vocabulary's entry of that name (`A`, not `▁A`). A
prompt longer than 2,048 tokens, its parts counted each for itself, loses shots: all of the greatest length at once,
until the rest fits. Where header and question alone do not fit, the header goes, and the shots with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.evaluation.documents import FOUR
from llmkit.evaluation.prompting import Case, Ids, Item, Prompting, Session, single_tokens
from llmkit.evaluation.protocol import Average
from llmkit.evaluation.record import Question

MAX_LENGTH = 2048


class Official(Prompting):
    """Li and others, arXiv 2306.09212."""

    name = "official"
    average: Average = "macro"

    def answer(self, session: Session, cases: Sequence[Case], *, chat: bool) -> list[Question]:
        """The letter whose token is most probable after the prompt."""
        questions = [_question(case.item) for case in cases]
        longest = min(MAX_LENGTH, session.max_length)
        prompts = session.prompts(fit_shots(session, cases, [header(case) for case in cases], questions, longest))
        letters = single_tokens([session.token_id(letter) for letter in FOUR], self.name)
        return session.choose(cases, prompts, [letters[: len(case.item.choices)] for case in cases])


def fit_shots(
    session: Session, cases: Sequence[Case], headers: Sequence[str], questions: Sequence[str], longest: int
) -> list[str]:
    """The texts, with those of the shots that there is room for.

    Args:
        headers, questions: what the text of each case begins and ends with.
        longest: a text in tokens.
    """
    pieces = [*questions, *set(headers), *{_shot(shot) for case in cases for shot in case.shots}]
    ids: dict[str, Ids] = dict(zip(pieces, session.encode(pieces), strict=True))
    texts = []
    for case, head, end in zip(cases, headers, questions, strict=True):
        room = longest - len(ids[head]) - len(ids[end])
        if room < 0:
            texts.append(end)
            session.n_fewer_shots += bool(case.shots)
            continue
        shots = [_shot(shot) for shot in case.shots]
        while shots and sum(len(ids[shot]) for shot in shots) >= room:
            greatest = max(len(ids[shot]) for shot in shots)
            shots = [shot for shot in shots if len(ids[shot]) != greatest]
        session.n_fewer_shots += len(shots) < len(case.shots)
        texts.append("".join([head, *shots, end]))
    return texts


def header(case: Case) -> str:
    """What the questions are about."""
    return f"以下是关于{case.subject.label or case.subject.name}的单项选择题，请直接给出正确答案的选项。\n\n"


def _shot(item: Item) -> str:
    return f"{_question(item)}{item.answer}\n\n"


def _question(item: Item) -> str:
    return f"题目：{item.text}\n答案是："


PROTOCOL = Official()
