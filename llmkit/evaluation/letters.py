"""Baselines and checks beside the accuracy: chance, the commonest letter, the probability of all letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # records hold the letters
    from llmkit.evaluation.record import Question

LOW_MASS = 0.1
"""Below it the letters are hardly what the model expects. (SmolLM2 on MMLU has 0.14 without shots, 0.97 with 5.)"""


@dataclass(frozen=True, slots=True)
class Letters:
    """Of the questions of one benchmark.

    Attributes:
        chance: the accuracy of a guess among each question's choices.
        majority: the accuracy of always answering `majority_letter`, the commonest right one.
        mass: mean probability of all letters together; None where no question has it.
        n_unread: answers that could not be read.
    """

    chance: float
    majority: float
    majority_letter: str
    mass: float | None
    n_unread: int

    def warnings(self, title: str) -> list[str]:
        """Reasons not to quote the accuracy of the benchmark `title`."""
        if self.mass is None or self.mass >= LOW_MASS:
            return []
        return [
            f"{title}: the letters have {self.mass:.1%} of the probability: the model expects something else there; "
            "look at the prompts, the letters' token ids, the chat format and the number of shots"
        ]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "chance": self.chance, "majority": self.majority, "majority_letter": self.majority_letter,
            "mass": self.mass, "n_unread": self.n_unread,
        }  # fmt: skip


def letters_of(questions: Sequence[Question]) -> Letters | None:
    """The letters of a benchmark's questions; None without questions.

    How many choices a question has is the number of its log-probabilities, else as many as the last letter says that is
    right or chosen anywhere in the benchmark.
    """
    if not questions:
        return None
    right = Counter(q.target for q in questions)
    letter = min(right, key=lambda x: (-right[x], x))
    masses = [q.mass for q in questions if q.mass is not None]
    return Letters(
        chance=_chance(
            questions, max(map(ascii_uppercase.find, {x for q in questions for x in (q.target, q.choice)})) + 1
        ),
        majority=right[letter] / len(questions),
        majority_letter=letter,
        mass=fsum(masses) / len(masses) if masses else None,
        n_unread=sum(not q.choice for q in questions),
    )


def _chance(questions: Sequence[Question], n_letters: int) -> float:
    return fsum(1 / (len(q.logprobs) if q.logprobs else n_letters) for q in questions) / len(questions)
