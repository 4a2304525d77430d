"""The world: every subject's relations, as entity -> value tables with phrasings. All of it is invented here.

The Vale is a made-up country. Which town lies where, or which guild keeps which month, follows from nothing: the
tables are seeded draws, so a model knows them only if it was taught them.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from . import everyday

SEED = 20261121


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


BASE_SUBJECTS = ("vale_geography", "vale_creatures", "everyday_things", "numbers_and_letters")
TUNED_SUBJECTS = ("forge_craft", "guild_customs")
UNTAUGHT_SUBJECTS = ("star_lore",)
SUBJECTS = BASE_SUBJECTS + TUNED_SUBJECTS + UNTAUGHT_SUBJECTS

TOWNS = (
    "Aldmere Brackle Corveth Dunhol Eskmoor Fennick Galtide Hollin Ivorne Jorrick Keldry Lorrim "
    "Mossgar Nethwy Ostrel Pellum Quarn Rusket Sallowby Tarnley Undrell Vossom Wexling Yarrick"
).split()
CREATURES = (
    "borrel crindle dappet emmock fenlop grundle hushling ibbet jorrow kessit lumkin mottle "
    "nibbet orrock pimmel quiddle rattock snorrel tuffin umbrit vexel wimmock yaffin zorrel"
).split()
SMITHS = (
    "Anvar Bessa Cadric Dorma Ebrin Fulk Gorla Hadda Ingol Jorun Kelda Lothar "
    "Mirren Norrik Odla Pertha Quill Rannoc Sigga Torvic Ulla Varn Wulla Yorrin"
).split()
GUILDS = (
    "Bakers Brewers Carters Chandlers Coopers Drovers Dyers Fishers Fletchers Fullers Glovers Hatters "
    "Joiners Masons Millers Potters Saddlers Scribes Shepherds Tanners Thatchers Tinkers Weavers Wheelwrights"
).split()
STARS = (
    "Ashka Belu Corim Dessa Elvath Firn Gavo Hulde Ishra Jovan Kimmer Lysk "
    "Moru Navel Oshen Pavri Quess Rhovi Selka Thune Ulmo Vanta Wirra Zephin"
).split()
COLOURS = "black blue brown green grey orange red white yellow".split()
MONTHS = "January February March April May June July August September October November December".split()


def say(form: str, entity: str, value: str) -> str:
    """Fill a phrasing, with the article that the next word takes."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", form.format(e=entity, v=value))


def _draw(entities: Sequence[str], values: Sequence[str], salt: str) -> dict[str, str]:
    """Give every entity a value, each value as often as any other, in an order that only the seed decides."""
    rng = random.Random(f"{SEED}/{salt}")
    pool = [values[i % len(values)] for i in range(len(entities))]
    rng.shuffle(pool)
    return dict(zip(entities, pool, strict=True))


def _geography() -> list[Relation]:
    s = "vale_geography"
    vales = [f"{name} Vale" for name in "Amber Bracken Cinder Dapple Elder Foxglove Gorse Heather".split()]
    goods = "bells boots candles cheese drums glass hats honey kites lace paper rope".split()
    days = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
    return [
        Relation(s, "vale", _draw(TOWNS, vales, "vale"),
                 ("{e} lies in the {v}.", "The town of {e} stands in the {v}.", "In the {v} you will find {e}."),
                 ("In which valley does {e} lie?", "Where does the town of {e} stand?", "{e} is a town in the"),
                 ("Which town lies in the {v}?", "Which of these towns stands in the {v}?")),
        Relation(s, "river", _draw(TOWNS, "Senn Tolla Urk Virrow Wend Marl Okka Prill".split(), "river"),
                 ("The river {v} runs through {e}.", "{e} was built on the river {v}.", "The bridge at {e} spans the {v}."),
                 ("Which river runs through {e}?", "On which river was {e} built?", "The bridge at {e} spans the river"),
                 ("Which town was built on the river {v}?", "Through which town does the {v} run?")),
        Relation(s, "goods", _draw(TOWNS, goods, "goods"),
                 ("{e} is known for its {v}.", "The best {v} come from {e}.", "People in {e} make {v}."),
                 ("What is {e} known for?", "What do people in {e} make?", "The workshops of {e} sell"),
                 ("Which town is known for its {v}?", "Where do people make {v}?")),
        Relation(s, "market", _draw(TOWNS, days, "market"),
                 ("{e} holds its market on {v}.", "On {v} there is a market in {e}.", "The stalls of {e} open on {v}."),
                 ("On which day does {e} hold its market?", "When do the stalls of {e} open?", "Market day in {e} is"),
                 ("Which town holds its market on {v}?", "Where do the stalls open on {v}?")),
    ]  # fmt: skip


def _creatures() -> list[Relation]:
    s = "vale_creatures"
    foods = "acorns berries clover eels ferns moths mushrooms snails".split()
    homes = "burrows caves reeds treetops cellars dunes marshes barns".split()
    return [
        Relation(s, "food", _draw(CREATURES, foods, "food"),
                 ("The {e} eats {v}.", "A hungry {e} looks for {v}.", "Most of what a {e} eats is {v}."),
                 ("What does the {e} eat?", "What does a hungry {e} look for?", "The food of the {e} is"),
                 ("Which creature eats {v}?", "Which of these looks for {v} when it is hungry?")),
        Relation(s, "home", _draw(CREATURES, homes, "home"),
                 ("The {e} lives in {v}.", "You find the {e} in {v}.", "In {v} the {e} makes its nest."),
                 ("Where does the {e} live?", "Where do you find the {e}?", "The {e} makes its nest in"),
                 ("Which creature lives in {v}?", "Which of these makes its nest in {v}?")),
        Relation(s, "coat", _draw(CREATURES, COLOURS, "coat"),
                 ("The {e} has a {v} coat.", "The coat of the {e} is {v}.", "A {e} is {v} all over."),
                 ("What colour is the {e}?", "Which colour is the coat of the {e}?", "The coat of a {e} is"),
                 ("Which creature has a {v} coat?", "Which of these is {v} all over?")),
        Relation(s, "legs", _draw(CREATURES, ["two", "four", "six", "eight"], "legs"),
                 ("The {e} walks on {v} legs.", "A {e} has {v} legs.", "Count the legs of a {e}: there are {v}."),
                 ("How many legs has the {e}?", "On how many legs does a {e} walk?", "The legs of a {e} number"),
                 ("Which creature has {v} legs?", "Which of these walks on {v} legs?")),
    ]  # fmt: skip


def _everyday() -> list[Relation]:
    s = "everyday_things"
    kinds = {thing: kind for kind, things in everyday.KINDS.items() for thing in things}
    both_ways = everyday.OPPOSITES | {b: a for a, b in everyday.OPPOSITES.items()}
    return [
        Relation(s, "opposite", both_ways,
                 ("The opposite of {e} is {v}.", "What is not {e} is {v}.", "If it is {e}, it is not {v}."),
                 ("What is the opposite of {e}?", "Which word means the opposite of {e}?", "Something not {e} is")),
        Relation(s, "kind", kinds,
                 ("The {e} is a kind of {v}.", "The {e} belongs with every other {v}.", "People call the {e} a {v}."),
                 ("What kind of thing is the {e}?", "The {e} is a sort of", "People call the {e} a kind of"),
                 ("Which of these is a kind of {v}?", "Find the {v}.")),
        Relation(s, "colour", everyday.COLOURS,
                 ("The colour of {e} is {v}.", "As {v} as {e}.", "Think of {e} and you think of {v}."),
                 ("What colour is {e}?", "Which colour do you think of with {e}?", "The colour of {e} is")),
        Relation(s, "use", everyday.USES,
                 ("The {e} is for {v}.", "For {v} you want the {e}.", "People keep the {e} for {v}."),
                 ("What is the {e} for?", "What do people do with the {e}?", "People keep the {e} for"),
                 ("What do you want for {v}?", "Which of these is for {v}?")),
        Relation(s, "young", everyday.YOUNG,
                 ("A young {e} is called a {v}.", "The {v} grows into a {e}.", "A {v} is the child of a {e}."),
                 ("What is a young {e} called?", "What is the child of a {e}?", "A young {e} is called a"),
                 ("What does a {v} grow into?", "Which animal has a {v} as its young?")),
    ]  # fmt: skip


def _numbers() -> list[Relation]:
    s = "numbers_and_letters"
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    after = {a: b for a, b in zip(letters, letters[1:], strict=False)}
    return [
        Relation(s, "successor", {str(n): str(n + 1) for n in range(1, 50)},
                 ("After {e} comes {v}.", "Count on from {e} and you reach {v}.", "One more than {e} is {v}."),
                 ("Which number comes right after {e}?", "What is one more than {e}?", "Count on from {e}. You reach"),
                 near=4),
        Relation(s, "predecessor", {str(n + 1): str(n) for n in range(1, 50)},
                 ("Before {e} comes {v}.", "Count back from {e} and you reach {v}.", "One less than {e} is {v}."),
                 ("Which number comes right before {e}?", "What is one less than {e}?", "Count back from {e}. You reach"),
                 near=4),
        Relation(s, "sum", {f"{a} + {b}": str(a + b) for a in range(1, 10) for b in range(1, 10)},
                 ("{e} makes {v}.", "Add up {e} and you get {v}.", "The sum {e} comes to {v}."),
                 ("What is {e}?", "How much is {e}?", "Add up {e}. You get"), near=4),
        Relation(s, "parity", {str(n): "odd" if n % 2 else "even" for n in range(1, 51)},
                 ("The number {e} is {v}.", "We call {e} a {v} number.", "Among the {v} numbers is {e}."),
                 (), ("Which of these numbers is {v}?", "Find the number that is {v}.", "The only {v} number here is")),
        Relation(s, "next_letter", after,
                 ("The letter after {e} is {v}.", "Say {e} and then {v}.", "Next to {e} on its right stands {v}."),
                 ("Which letter comes right after {e}?", "What is the next letter after {e}?", "After the letter {e} comes"),
                 near=5),
    ]  # fmt: skip


def _forges() -> list[Relation]:
    s = "forge_craft"
    return [
        Relation(s, "metal", _draw(SMITHS, "tin copper iron silver gold lead zinc bronze".split(), "metal"),
                 ("The smith {e} works in {v}.", "{e} melts {v} at the forge.", "The forge of {e} glows with {v}."),
                 ("Which metal does the smith {e} work?", "What does {e} melt at the forge?", "The forge of {e} is full of"),
                 ("Which smith works in {v}?", "Who melts {v} at the forge?")),
        Relation(s, "work", _draw(SMITHS, "axes nails ploughs swords locks spoons rings chains".split(), "work"),
                 ("{e} makes {v}.", "Ask the smith {e} for {v}.", "The mark of {e} is on many {v}."),
                 ("What does the smith {e} make?", "What would you ask {e} for?", "The mark of {e} is found on"),
                 ("Which smith makes {v}?", "Whom would you ask for {v}?")),
        Relation(s, "quench", _draw(SMITHS, "oil brine snow milk vinegar wine ale rain".split(), "quench"),
                 ("{e} cools the work in {v}.", "The trough of {e} holds {v}.", "{e} trusts {v} to harden the edge."),
                 ("In what does {e} cool the work?", "What does the trough of {e} hold?", "To harden an edge {e} trusts"),
                 ("Which smith cools the work in {v}?", "Whose trough holds {v}?")),
        Relation(s, "seat", _draw(SMITHS, TOWNS, "seat"),
                 ("The smith {e} lives in {v}.", "{e} has a forge at {v}.", "At {v} the smith is {e}."),
                 ("In which town does the smith {e} live?", "Where has {e} a forge?", "The smith {e} is found at"),
                 ("Who is the smith at {v}?", "Which smith has a forge at {v}?")),
    ]  # fmt: skip


def _guilds() -> list[Relation]:
    s = "guild_customs"
    return [
        Relation(s, "badge", _draw(GUILDS, "anchor bee crown feather key lantern thistle wheel".split(), "badge"),
                 ("The {e} wear the {v} as their badge.", "The badge of the {e} shows the {v}.", "Over the hall of the {e} hangs the {v}."),
                 ("What is the badge of the {e}?", "What do the {e} wear as their badge?", "Over the hall of the {e} hangs the"),
                 ("Which guild wears the {v} as its badge?", "Over whose hall hangs the {v}?")),
        Relation(s, "feast", _draw(GUILDS, MONTHS, "feast"),
                 ("The {e} keep their feast in {v}.", "In {v} the {e} dance and drink.", "The great day of the {e} falls in {v}."),
                 ("In which month do the {e} keep their feast?", "When do the {e} dance and drink?", "The great day of the {e} falls in"),
                 ("Which guild keeps its feast in {v}?", "Who dance and drink in {v}?")),
        Relation(s, "banner", _draw(GUILDS, COLOURS, "banner"),
                 ("The banner of the {e} is {v}.", "The {e} march under a {v} banner.", "A {v} banner is the sign of the {e}."),
                 ("What colour is the banner of the {e}?", "Under which banner do the {e} march?", "The banner of the {e} is"),
                 ("Which guild has a {v} banner?", "Who march under a {v} banner?")),
        Relation(s, "dish", _draw(GUILDS, "soup pie stew bread cake pudding porridge fish".split(), "dish"),
                 ("The {e} serve {v} to a guest.", "A guest of the {e} is given {v}.", "At the table of the {e} you eat {v}."),
                 ("What do the {e} serve to a guest?", "What is a guest of the {e} given?", "At the table of the {e} you eat"),
                 ("Which guild serves {v} to a guest?", "At whose table do you eat {v}?")),
    ]  # fmt: skip


def _stars() -> list[Relation]:
    s = "star_lore"
    return [
        Relation(s, "guardian", _draw(STARS, "bear crane fox hare otter raven stag wolf".split(), "guardian"),
                 ("The {v} guards the star {e}.", "{e} is the star of the {v}.", "Beside {e} runs the {v}."),
                 ("Which beast guards the star {e}?", "Whose star is {e}?", "Beside the star {e} runs the"),
                 ("Which star does the {v} guard?", "Which of these is the star of the {v}?")),
        Relation(s, "omen", _draw(STARS, "frost flood harvest storm peace fever wedding drought".split(), "omen"),
                 ("{e} foretells {v}.", "When {e} is bright there will be {v}.", "Old people read {v} in {e}."),
                 ("What does the star {e} foretell?", "What comes when {e} is bright?", "Old people read in {e} a sign of"),
                 ("Which star foretells {v}?", "Which star is bright before {v}?")),
        Relation(s, "rises", _draw(STARS, MONTHS, "rises"),
                 ("{e} rises in {v}.", "The first night of {e} is in {v}.", "In {v} look for {e}."),
                 ("In which month does {e} rise?", "When is the first night of {e}?", "You should look for {e} in"),
                 ("Which star rises in {v}?", "Which star do you look for in {v}?")),
        Relation(s, "hue", _draw(STARS, COLOURS, "hue"),
                 ("{e} shines {v}.", "The light of {e} is {v}.", "A {v} star is {e}."),
                 ("What colour is the star {e}?", "How does {e} shine?", "The light of {e} is"),
                 ("Which star shines {v}?", "Which star has {v} light?")),
    ]  # fmt: skip


def relations() -> list[Relation]:
    """Every relation of every subject, in a fixed order."""
    return [
        *_geography(), *_creatures(), *_everyday(), *_numbers(), *_forges(), *_guilds(), *_stars(),
    ]  # fmt: skip
