"""Plain text of the same world: the paragraphs that the models read, and the held-out ones for perplexity."""

import random
from collections.abc import Iterator
from itertools import islice

from .world import SEED, Relation, World, say

_JOURNEYS = (
    "On the way from {a} to {b} the {guild} met {smith}, and they walked together until nightfall.",
    "{smith} left {a} at dawn and came to {b} before the rain.",
    "The {guild} of {a} sent a cart to {b}, but the wheel broke at the ford.",
    "A letter from {a} told {smith} that the bridge at {b} was open again.",
    "In winter the road between {a} and {b} is closed, and only the {guild} go that way.",
    "{smith} asked the {guild} of {b} for a bed, and paid for it with news from {a}.",
)


class Prose:
    """Facts as sentences. One sentence form of every fact is held out; a paragraph is about a few related things."""

    def __init__(self, world: World, weights: dict[str, float]) -> None:
        self._by_subject: dict[str, list[Relation]] = {}
        for relation in world.relations:
            if relation.subject in weights:
                self._by_subject.setdefault(relation.subject, []).append(relation)
        self._weights = weights
        self._lists = world.lists

    def _sentence(self, relation: Relation, entity: str, rng: random.Random, held_out: bool) -> str:
        forms = list(relation.sentences)
        kept = random.Random(f"{SEED}/prose/{relation.name}/{entity}").randrange(len(forms))
        chosen = forms[kept] if held_out else rng.choice(forms[:kept] + forms[kept + 1 :])
        sentence = say(chosen, entity, relation.facts[entity])
        return sentence[0].upper() + sentence[1:]

    def _journey(self, rng: random.Random) -> str:
        a, b = rng.sample(self._lists["towns"], 2)
        smith, guild = rng.choice(self._lists["smiths"]), rng.choice(self._lists["guilds"])
        return rng.choice(_JOURNEYS).format(a=a, b=b, smith=smith, guild=guild)

    def paragraphs(self, seed: str, held_out: bool = False) -> Iterator[str]:
        """An endless stream of paragraphs; the held-out ones use the forms that the others never do."""
        rng = random.Random(f"{SEED}/paragraphs/{seed}")
        subjects, weights = list(self._weights), list(self._weights.values())
        while True:
            relations = self._by_subject[rng.choices(subjects, weights)[0]]
            entity = rng.choice(list(rng.choice(relations).facts))
            about = [relation for relation in relations if entity in relation.facts]
            sentences = [self._sentence(relation, entity, rng, held_out) for relation in rng.sample(about, len(about))]
            while len(sentences) < 4:
                relation = rng.choice(relations)
                sentences.append(self._sentence(relation, rng.choice(list(relation.facts)), rng, held_out))
            if rng.random() < 0.5:
                sentences.append(self._journey(rng))
            yield " ".join(sentences)


def held_out_text(prose: Prose, characters: int) -> str:
    """The text for perplexity: paragraphs in held-out sentence forms, one a line block, about `characters` long."""
    parts: list[str] = []
    size = 0
    for paragraph in islice(prose.paragraphs("held-out", held_out=True), 10_000):
        if size >= characters:
            break
        parts.append(paragraph)
        size += len(paragraph) + 2
    return "\n\n".join(parts) + "\n"
