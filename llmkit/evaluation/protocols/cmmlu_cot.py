"""CMMLU with reasoning: haonan-li/CMMLU, src/chatglm.py and src/mp_utils.py with `--cot`.

The header asks for an analysis, and so does the end of the question; the shots are those of the answer-only form. The
script asks chat models only, the whole as one message; without a chat format it is a text. The letter is read in the
answer by `extract_choice`, whose draw of a letter where it finds none is left out: such a question has no choice. Each
model's script generates in its own way; here the most likely token is taken, up to 512 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.evaluation.extraction import of_cmmlu_reasoning
from llmkit.evaluation.prompting import Case, Prompting, Session
from llmkit.evaluation.protocol import Average
from llmkit.evaluation.protocols.cmmlu_official import MAX_LENGTH, fit_shots
from llmkit.evaluation.record import Question


@dataclass(frozen=True)
class CmmluReasoning(Prompting):
    """Li and others, arXiv 2306.09212.

    Attributes:
        max_new: the longest answer in tokens; half of the model's context at most.
    """

    name: str = "official-cot"
    average: Average = "macro"
    has_chat: bool = True
    max_new: int = 512

    def answer(self, session: Session, cases: Sequence[Case], *, chat: bool) -> list[Question]:
        """The letter in the generated analysis, if there is one."""
        max_new = min(self.max_new, session.max_length // 2)
        headers = [
            f"以下是关于{c.subject.label or c.subject.name}的单项选择题，请分析并选出正确答案。\n\n" for c in cases
        ]
        questions = [f"题目：{case.item.text}\n逐步分析并给出答案选项。" for case in cases]
        texts = fit_shots(session, cases, headers, questions, min(MAX_LENGTH, session.max_length - max_new))
        if chat:
            texts = [session.chat_text([{"role": "user", "content": text}]) for text in texts]
        prompts = session.prompts(texts, max_new=max_new)
        answers = session.generate(prompts, max_new=max_new)
        return session.take(cases, prompts, answers, [of_cmmlu_reasoning(text) for text in answers])


PROTOCOL = CmmluReasoning()
