"""C-Eval as its authors score it: hkust-nlp/ceval, code/evaluator_series and resources/tutorial.md.

Answer-only: the most probable of the letters as the next token, each letter by the first token that it is alone
(`▁A` of a SentencePiece vocabulary: the script for LLaMA takes the letter's encoding). The tutorial keeps the header
without shots, where the script has none, and leaves out shots that the model's context has no room for: here the last.

In a chat format the header is the system message (in front of the first question, where the format has none), a shot is
one turn, and the letter is read in what the model answers, by the rules of the script for ChatGLM.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.evaluation.documents import FOUR
from llmkit.evaluation.extraction import of_ceval_chat
from llmkit.evaluation.prompting import Case, Item, Prompting, Session, drop_last_shots, single_tokens
from llmkit.evaluation.protocol import Average
from llmkit.evaluation.record import Question

_MAX_NEW = 512


class Official(Prompting):
    """Huang and others, arXiv 2305.08322."""

    name = "official"
    average: Average = "macro"
    has_chat = True

    def answer(self, session: Session, cases: Sequence[Case], *, chat: bool) -> list[Question]:
        """The letter whose token is most probable after the prompt; of a chat model the one in its answer."""
        if chat:
            return self._chat(session, cases)
        prompts = session.prompts(drop_last_shots(session, cases, write_prompt, session.max_length))
        alone = session.encode(FOUR, special=False)
        letters = single_tokens([ids[0] for ids in alone], self.name)
        return session.choose(cases, prompts, [letters[: len(case.item.choices)] for case in cases])

    def _chat(self, session: Session, cases: Sequence[Case]) -> list[Question]:
        max_new = min(_MAX_NEW, session.max_length // 2)

        def write(case: Case, n_shots: int) -> str:
            messages = [{"role": "system", "content": header(case)}]
            for shot in case.shots[:n_shots]:
                messages += [
                    {"role": "user", "content": _question(shot)},
                    {"role": "assistant", "content": shot.answer},
                ]
            return session.chat_text([*messages, {"role": "user", "content": _question(case.item)}])

        texts = drop_last_shots(session, cases, write, session.max_length - max_new)
        prompts = session.prompts(texts, max_new=max_new)
        replies = session.generate(prompts, max_new=max_new)
        letters = [of_ceval_chat(r.strip(), case.item.choices) for r, case in zip(replies, cases, strict=True)]
        return session.take(cases, prompts, replies, letters)


def header(case: Case) -> str:
    """What the questions are about."""
    return f"以下是中国关于{case.subject.label or case.subject.name}考试的单项选择题，请选出其中的正确答案。"


def write_prompt(case: Case, n_shots: int) -> str:
    """The text for a case with its first shots."""
    shots = [f"{_question(shot)}{shot.answer}" for shot in case.shots[:n_shots]]
    return "\n\n".join([header(case), *shots, _question(case.item)])


def _question(item: Item) -> str:
    return f"{item.text}\n答案："


PROTOCOL = Official()
