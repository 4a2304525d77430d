"""C-Eval in two stages: THUDM/ChatGLM2-6B, evaluation/evaluate_ceval.py.

The model answers freely, in at most 512 tokens; then it reads the question once more with its answer and
`综上所述，ABCD中正确的选项是：`, and the most probable of the letters' tokens counts. There are no shots. The round of
ChatGLM2 stands around both prompts, whatever the model.

The questions that the script reads were put out as JSON lines elsewhere; here they are C-Eval's question and choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmkit.errors import InputError
from llmkit.evaluation.documents import FOUR
from llmkit.evaluation.prompting import Case, Prompting, Session, single_tokens
from llmkit.evaluation.protocol import Plan, Workload
from llmkit.evaluation.record import Question

_SUMMARY = "综上所述，ABCD中正确的选项是："


@dataclass(frozen=True)
class TwoStages(Prompting):
    """The figures that ChatGLM2's authors report.

    Attributes:
        max_new: the longest first answer in tokens; half of the model's context at most.
    """

    name: str = "chatglm"
    shots: int = 0
    max_new: int = 512

    def plan(self, work: Workload) -> Plan:
        """The items of all subjects."""
        if work.shots:
            raise InputError(f"--protocol {self.name} has no shots, found {work.shots}", hint="leave --shots out")
        return super().plan(work)

    def answer(self, session: Session, cases: Sequence[Case], *, chat: bool) -> list[Question]:
        """The letter that is most probable after the model's own explanation."""
        max_new = min(self.max_new, session.max_length // 2)
        first = session.prompts([in_round(case.item.text) for case in cases], max_new=max_new)
        texts = session.generate(first, max_new=max_new)
        second = session.prompts(
            [in_round(f"{case.item.text}{text}\n{_SUMMARY}") for case, text in zip(cases, texts, strict=True)]
        )
        letters = [ids[0] for ids in session.encode(FOUR, special=False)]
        options = single_tokens(letters, self.name)
        questions = session.choose(cases, second, [options] * len(cases))
        # what was sent first is the same for all models with one tokenizer, and is what tells runs apart
        return [replace(q, prompt=prompt.hash) for q, prompt in zip(questions, first, strict=True)]


def in_round(text: str) -> str:
    """The one round of a conversation, up to the answer."""
    return f"[Round 1]\n\n问：{text}\n\n答："


PROTOCOL = TwoStages()
