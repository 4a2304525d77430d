"""C-Eval with a chain of thought: hkust-nlp/ceval, README and code/evaluator_series.

As a text (evaluators/llama.py) the shots and the question stand below one header, and the answer begins with
`让我们一步一步思考，` and `1.`; in a chat format (evaluators/chatglm.py) each shot is a turn, the header stands before
the first, and without shots there is none. Each script has its own rules for the letter. Shots that do not fit with the
answer of at most 512 tokens are left out from the last on.

The script for LLaMA samples (temperature 0.8, top-p 0.95), the others decode greedily; here all do, so that a score is
one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.evaluation import extraction
from llmkit.evaluation.prompting import Case, Item, Prompting, Session, drop_last_shots
from llmkit.evaluation.protocol import Average
from llmkit.evaluation.record import Question

_LEAD = "让我们一步一步思考，\n"
_NEXT = "让我们一步一步思考"  # what follows it is another question, which the model made up


@dataclass(frozen=True)
class CevalReasoning(Prompting):
    """Huang and others, arXiv 2305.08322.

    Attributes:
        max_new: the longest answer in tokens; half of the model's context at most.
    """

    name: str = "official-cot"
    average: Average = "macro"
    has_chat: bool = True
    max_new: int = 512

    def answer(self, session: Session, cases: Sequence[Case], *, chat: bool) -> list[Question]:
        """The letter in the generated explanation, if there is one."""
        max_new = min(self.max_new, session.max_length // 2)
        write = (lambda case, k: session.chat_text(messages(case, k))) if chat else write_prompt
        fitting = drop_last_shots(session, cases, write, session.max_length - max_new)
        prompts = session.prompts(fitting, max_new=max_new)
        texts = session.generate(prompts, max_new=max_new, stops=() if chat else (_NEXT,))
        pairs = list(zip(cases, texts, strict=True))
        if chat:
            letters = [extraction.of_ceval_chat(text.strip(), case.item.choices) for case, text in pairs]
        else:
            letters = [
                extraction.of_ceval_reasoning(f"{_LEAD}1.{text}", case.item.choices, case.item.answer)
                for case, text in pairs
            ]
        return session.take(cases, prompts, texts, letters)


def write_prompt(case: Case, n_shots: int) -> str:
    """The text for a case with its first shots."""
    shots = "".join(f"{write_item(s)}{_LEAD}{s.explanation}\n所以答案是{s.answer}。\n\n" for s in case.shots[:n_shots])
    return f"{_header(case)}{shots}{write_item(case.item)}{_LEAD}1."


def messages(case: Case, n_shots: int) -> list[dict[str, str]]:
    """The conversation for a case with its first shots."""
    turns: list[dict[str, str]] = []
    for shot in case.shots[:n_shots]:
        turns.append({"role": "user", "content": ("" if turns else _header(case)) + write_item(shot)})
        turns.append({"role": "assistant", "content": f"{_LEAD}{shot.explanation}\n所以答案是{shot.answer}。"})
    return [*turns, {"role": "user", "content": write_item(case.item)}]


def write_item(item: Item) -> str:
    """A question up to where its answer begins."""
    return f"{item.text}\n答案："


def _header(case: Case) -> str:
    return f"以下是中国关于{case.subject.label or case.subject.name}考试的单项选择题，请选出其中的正确答案。\n\n"


PROTOCOL = CevalReasoning()
