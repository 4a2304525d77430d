"""MMLU by its authors' script: hendrycks/test, evaluate.py.

Two spaces stand before the subject's name. The shots are the first of the dev file; while a prompt is longer than 2,048
tokens, its last shot goes. Scored are the next tokens after `Answer:` that ` A` to ` D` begin with. The script reads
its files with pandas, which makes `nan` of a cell that says `None`; here cells stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.evaluation.documents import LETTERS
from llmkit.evaluation.prompting import Case, Item, Prompting, Session, drop_last_shots
from llmkit.evaluation.record import Question

_MAX_LENGTH = 2048


class Original(Prompting):
    """Hendrycks and others, arXiv 2009.03300."""

    name = "original"

    def answer(self, session: Session, cases: Sequence[Case], *, chat: bool) -> list[Question]:
        """The letter whose token is most probable after the prompt."""
        longest = min(_MAX_LENGTH, session.max_length)
        texts = drop_last_shots(session, cases, write_prompt, longest)
        letters = [[f" {letter}" for letter in LETTERS[: len(case.item.choices)]] for case in cases]
        prompts, options = session.prompts_and_options(texts, letters)
        return session.choose(cases, prompts, options)


def write_prompt(case: Case, n_shots: int) -> str:
    """The text for a case with its first shots."""
    subject = "".join(f" {word}" for word in case.subject.name.split("_"))
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return header + "".join(f"{_write(s)} {s.answer}\n\n" for s in case.shots[:n_shots]) + _write(case.item)


def _write(item: Item) -> str:
    return f"{item.text}\nAnswer:"


PROTOCOL = Original()
