"""Multiple-choice questions from the world's relations: what is held out for the tests, prompts, CSV files."""

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .world import SEED, SUBJECTS, Relation, say

LETTERS = "ABCD"
DEV_ROWS = 5
TEST_ROWS = 80


@dataclass(frozen=True)
class Item:
    """One question with its four options; `answer` is the index of the right one."""

    question: str
    options: tuple[str, ...]
    answer: int

    def prompt(self) -> str:
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=True)]
        return "\n".join([self.question.strip(), *lines, "Answer:"])


@dataclass(frozen=True)
class Asking:
    """One fact asked in one phrasing; every item drawn from it differs in its wrong options and their order."""

    question: str
    right: str
    wrong: tuple[str, ...]

    def item(self, rng: random.Random, answer: int | None = None) -> Item:
        options = rng.sample(self.wrong, 3)
        place = rng.randrange(4) if answer is None else answer
        return Item(self.question, (*options[:place], self.right, *options[place:]), place)


def header(subject: str) -> str:
    """The first lines of a prompt, as lm-eval's MMLU task writes them."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def document(subject: str, shots: Sequence[Item], last: Item) -> str:
    """The prompt of lm-eval's MMLU task: header, answered shots, and the open question."""
    answered = [f"{shot.prompt()} {LETTERS[shot.answer]}\n\n" for shot in shots]
    return header(subject) + "".join(answered) + last.prompt()


def _near(relation: Relation, right: str) -> tuple[str, ...]:
    """The values closest to the right one in counting or alphabetical order."""
    values = sorted(set(relation.facts.values()), key=lambda value: (len(value), value))
    at = values.index(right)
    start = max(0, min(at - relation.near, len(values) - 2 * relation.near - 1))
    return tuple(value for value in values[start : start + 2 * relation.near + 1] if value != right)


def askings(relation: Relation) -> dict[str, list[Asking]]:
    """Every way of asking every fact of a relation, by entity."""
    found: dict[str, list[Asking]] = {}
    values = sorted(set(relation.facts.values()))
    for entity, value in relation.facts.items():
        others = _near(relation, value) if relation.near else tuple(v for v in values if v != value)
        strangers = tuple(other for other, theirs in relation.facts.items() if theirs != value)
        found[entity] = [Asking(say(text, entity, value), value, others) for text in relation.forward]
        found[entity] += [Asking(say(text, entity, value), entity, strangers) for text in relation.backward]
    return found


@dataclass(frozen=True)
class Split:
    """A subject's askings: those that training may use, and those that only the dev and test files use."""

    train: list[Asking]
    held_out: list[Asking]


def splits(relations: Iterable[Relation]) -> dict[str, Split]:
    """Hold out one phrasing of every fact, so that no test question's text (or pair of fact and text) is trained on."""
    found = {subject: Split([], []) for subject in SUBJECTS}
    for relation in relations:
        rng = random.Random(f"{SEED}/split/{relation.subject}/{relation.name}")
        split = found[relation.subject]
        for ways in askings(relation).values():
            kept = rng.randrange(len(ways))
            split.held_out.append(ways[kept])
            split.train.extend(ways[:kept] + ways[kept + 1 :])
    return found


def exam(subject: str, split: Split) -> tuple[list[Item], list[Item]]:
    """The dev and test items of a subject: seeded, no question twice, each letter right equally often."""
    rng = random.Random(f"{SEED}/exam/{subject}")
    trained = {(asking.question, asking.right) for asking in split.train}
    shuffled = rng.sample(split.held_out, len(split.held_out))
    unseen = {(a.question, a.right): a for a in shuffled if (a.question, a.right) not in trained}
    picked = list(unseen.values())[: DEV_ROWS + TEST_ROWS]
    answers = [i % 4 for i in range(len(picked) - DEV_ROWS)]
    rng.shuffle(answers)
    items = [asking.item(rng, answer) for asking, answer in zip(picked, [0, 2, 1, 3, 0, *answers], strict=True)]
    return items[:DEV_ROWS], items[DEV_ROWS:]


def write_csv(path: Path, items: Iterable[Item]) -> None:
    """MMLU's layout: no header; question, four options, the right letter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([item.question, *item.options, LETTERS[item.answer]] for item in items)


class Documents:
    """Answered documents to train on, from the askings that are not held out."""

    def __init__(self, split: dict[str, Split], subjects: dict[str, float], seed: str) -> None:
        self._split = split
        self._names, self._weights = list(subjects), list(subjects.values())
        self._words = sorted({asking.right for part in split.values() for asking in part.train})
        self._rng = random.Random(f"{SEED}/train/{seed}")

    def _drill(self, count: int) -> list[Asking]:
        """Finding a word again: how to answer by letter, with the names of every subject, taught or not."""
        asked = []
        for _ in range(count):
            word, *others = self._rng.sample(self._words, 8)
            asked.append(Asking(f"Which of these is {word}?", word, tuple(others)))
        return asked

    def draw(self, count: int, drill: float) -> str:
        """A document of `count` items on one subject, all answered: each prefix is a prompt with fewer shots."""
        if self._rng.random() < drill:
            subject, asked = "words", self._drill(count)
        else:
            subject = self._rng.choices(self._names, self._weights)[0]
            asked = self._rng.sample(self._split[subject].train, count)
        items = [asking.item(self._rng) for asking in asked]
        return document(subject, items[:-1], items[-1]) + f" {LETTERS[items[-1].answer]}\n"
