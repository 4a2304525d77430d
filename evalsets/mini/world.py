"""The world: every subject's relations, as entity -> value tables with phrasings, from `world.toml`.

The Vale is a made-up country. Which town lies where, or which guild keeps which month, follows from nothing: the
tables are seeded draws, so a model knows them only if it was taught them.
"""

import itertools
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20261121
BASE_SUBJECTS = ("vale_geography", "vale_creatures", "everyday_things", "numbers_and_letters")
TUNED_SUBJECTS = ("forge_craft", "guild_customs")
UNTAUGHT_SUBJECTS = ("star_lore",)
SUBJECTS = BASE_SUBJECTS + TUNED_SUBJECTS + UNTAUGHT_SUBJECTS


@dataclass(frozen=True)
class Relation:
    """A table of facts and the ways to ask for them: forward asks for the value, backward for an entity."""

    subject: str
    name: str
    facts: dict[str, str]
    sentences: tuple[str, ...]
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    near: int = 0  # wrong options come from this many places around the right one; 0 means from anywhere


@dataclass(frozen=True)
class World:
    """All relations in a fixed order, and the lists of names that they are about."""

    relations: tuple[Relation, ...]
    lists: dict[str, list[str]]


def say(form: str, entity: str, value: str) -> str:
    """Fill a phrasing, with the article that the next word takes."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", form.format(e=entity, v=value))


def _draw(entities: Sequence[str], values: Sequence[str], salt: str) -> dict[str, str]:
    """Give every entity a value, each value as often as any other, in an order that only the seed decides."""
    rng = random.Random(f"{SEED}/{salt}")
    pool = [values[i % len(values)] for i in range(len(entities))]
    rng.shuffle(pool)
    return dict(zip(entities, pool, strict=True))


def _computed() -> dict[str, dict[str, str]]:
    """The facts of numbers and letters, by the relation's name."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return {
        "successor": {str(n): str(n + 1) for n in range(1, 31)},
        "predecessor": {str(n + 1): str(n) for n in range(1, 31)},
        "sum": {f"{a} + {b}": str(a + b) for a in range(1, 8) for b in range(1, 8)},
        "parity": {str(n): "odd" if n % 2 else "even" for n in range(1, 41)},
        "next_letter": dict(itertools.pairwise(letters)),
    }


def _facts(entry: Mapping[str, Any], lists: Mapping[str, list[str]]) -> dict[str, str]:
    if "entities" in entry:
        values = entry["values"]
        return _draw(lists[entry["entities"]], lists[values] if isinstance(values, str) else values, entry["name"])
    if "facts" not in entry:
        return _computed()[entry["name"]]
    facts = dict(entry["facts"])
    return facts | {value: entity for entity, value in facts.items()} if entry.get("both_ways") else facts


def load_world() -> World:
    """The world of `world.toml`."""
    source = tomllib.loads(Path(__file__).with_name("world.toml").read_text(encoding="utf-8"))
    lists = source["lists"]
    relations = (
        Relation(
            subject=entry["subject"],
            name=entry["name"],
            facts=_facts(entry, lists),
            sentences=tuple(entry["sentences"]),
            forward=tuple(entry.get("forward", ())),
            backward=tuple(entry.get("backward", ())),
            near=entry.get("near", 0),
        )
        for entry in source["relations"]
    )
    return World(tuple(relations), lists)
