"""The published delta formats as data: what is added to what, in which dtype, and what new rows start from.

A wrong convention for the rows that the base lacks changes one row of two matrices, loads fine and shows in no chat;
so it is a property of the profile and never guessed while running.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from llmkit.errors import RequirementError, nearest
from llmkit.tensors.spec import DType

# Saved by old versions of the reference implementation, recomputed by every reader; never written.
BUFFERS = ("rotary_emb.inv_freq", "rope.freqs")  # how their names end


class Rule(Enum):
    """What a delta tensor holds, and so how the result is made."""

    ADD = "add"  # result = base + delta, shapes equal (after the profile's new rows)
    COPY = "copy"  # the delta holds the full values
    OVERLAP_ADD = "overlap_add"  # the base is added to the top-left block, the rest is full values
    OVERLAP_SUBTRACT = "overlap_subtract"  # the release is masked: result = delta - base in the top-left block
    SKIP = "skip"  # in neither


class NewRows(Enum):
    """What the rows that the base lacks start from before the delta is added."""

    MEAN = "mean"  # the mean over the base's rows, in float32, of each matrix
    ZERO = "zero"
    RAW = "raw"  # the delta's rows are the values
    NONE = "none"  # the base must have them


@dataclass(frozen=True)
class Profile:
    """One published convention.

    Attributes:
        releases: the checkpoints it covers.
        arithmetic: dtype both sides are cast to before the sum; None is the dtype the delta is stored in.
        widens: instead, the sum is in the dtype of both sides, or in float32 where they differ, as numpy adds arrays.
        new_rows: see `NewRows`; used by tensors under Rule.ADD that have more rows than the base's.
        rules: (glob, rule), the first that matches a name counts; no match is Rule.ADD.
        output: dtype of the result; None is the arithmetic's.
        max_new_rows: more new rows than this are no case for `new_rows` but for `other_shapes`.
        other_shapes: rule for tensors whose shape `new_rows` does not explain; None refuses them.
        delta_only: rule for names that the base lacks and no glob covers; None refuses them.
        base_prefix: the delta may nest the base's names under this.
        changes_family: the result may have another architecture than the base.
        tokenizer: whose tokenizer the result gets.
        caveat: what is not known of the format.
    """

    name: str
    releases: str
    arithmetic: DType | None
    new_rows: NewRows
    rules: tuple[tuple[str, Rule], ...] = ()
    output: DType | None = None
    max_new_rows: int | None = None
    other_shapes: Rule | None = None
    delta_only: Rule | None = None
    base_prefix: str = ""
    changes_family: bool = False
    tokenizer: str = "delta"
    caveat: str | None = None
    widens: bool = False

    def arithmetic_of(self, delta: DType, base: DType | None) -> DType:
        """The dtype of the sum of a delta's tensor and the base's (None: it has none)."""
        if self.widens and base is not None:
            return delta if delta is base else DType.F32
        return self.arithmetic or delta

    def rule_for(self, name: str) -> Rule:
        """The rule of the first glob that matches `name`."""
        for glob, rule in self.rules:
            if fnmatchcase(name, glob):
                return rule
        return Rule.ADD

    def describe(self) -> str:
        """Arithmetic and new rows in a few words, for the plan."""
        dtype = "the delta's dtype" if self.arithmetic is None else self.arithmetic.torch_name
        if self.widens:
            dtype = "the dtype of both sides, or float32 where they differ"
        rows = {
            NewRows.MEAN: "new rows start from the mean of the base's rows",
            NewRows.ZERO: "new rows start from zero",
            NewRows.RAW: "new rows are the delta's values",
            NewRows.NONE: "no new rows",
        }[self.new_rows]
        copied = " and ".join(glob for glob, rule in self.rules if rule is Rule.COPY and self.new_rows is NewRows.NONE)
        return f"arithmetic in {dtype}, {f'{copied} are full values' if copied else rows}"


_EMBEDDINGS = ("*embed_tokens.weight", "*lm_head.weight")
_OVERLAP = tuple((glob, Rule.OVERLAP_ADD) for glob in _EMBEDDINGS)

PROFILES: tuple[Profile, ...] = (
    Profile("alpaca", "Stanford Alpaca 7B", DType.F32, NewRows.MEAN),
    Profile("wizardlm", "WizardLM 7B V1.0, 13B, 30B", DType.F32, NewRows.MEAN),
    Profile(
        "tulu", "TULU, open-instruct -diff releases", DType.F32, NewRows.MEAN,
        caveat="the pad row may differ in the last bits: the release was made with whatever the library's resize did",
    ),
    Profile("gist", "Gist models", DType.F32, NewRows.MEAN),
    Profile("knowlm", "KnowLM ZhiXi 13B (float32 or half)", DType.F32, NewRows.MEAN),
    Profile(
        "alpaca-farm", "AlpacaFarm, reward models too", DType.F32, NewRows.MEAN, max_new_rows=1,
        other_shapes=Rule.COPY, delta_only=Rule.COPY, base_prefix="backbone_model.", changes_family=True,
    ),
    Profile("vicuna", "Vicuna v1.1 and later (FastChat)", DType.F16, NewRows.NONE),
    Profile("vicuna-v0", "Vicuna v0, StableVicuna, Wombat", DType.F16, NewRows.ZERO),
    Profile(
        "llava", "LLaVA v0 deltas", DType.F16, NewRows.RAW, (("*mm_projector.*", Rule.COPY), *_OVERLAP),
        changes_family=True,
    ),
    Profile(
        "ziya", "Ziya 13B v1", DType.F16, NewRows.NONE,
        tuple((glob, Rule.COPY) for glob in ("*embed_tokens*", "*lm_head.weight*")),
    ),
    Profile(
        "open-chinese-llama", "Open-Chinese-LLaMA 7B, in the converted layout", DType.F32, NewRows.NONE,
        (("*rope*", Rule.SKIP),), output=DType.F16, tokenizer="base",
        caveat="the names must be those of the converted layout on both sides",
    ),
    Profile(
        "billa", "BiLLa 7B", None, NewRows.RAW, (("*embed_tokens.weight", Rule.OVERLAP_SUBTRACT), ("*", Rule.COPY)),
        caveat="only the rows that the base has are unmasked; that the rows beyond are plain is not verified",
    ),
    Profile(
        "koala", "Koala 7B and 13B (EasyLM's streams)", None, NewRows.NONE, output=DType.BF16, widens=True,
        caveat="the published script saves bfloat16; --dtype float32 keeps all of the sum",
    ),
    Profile("plain", "any delta of equal shapes, added in the dtype it is stored in", None, NewRows.NONE),
)  # fmt: skip


def find_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        RequirementError: there is none.
    """
    by_name = {p.name: p for p in PROFILES}
    if name in by_name:
        return by_name[name]
    guess = nearest(name, by_name)
    hint = f"did you mean {guess}? " if guess else ""
    raise RequirementError(f"unknown delta profile {name!r}", hint=f"{hint}profiles: {', '.join([*by_name, 'llmkit'])}")


def is_buffer(name: str) -> bool:
    """Whether `name` is a rotary table that checkpoints of early 2023 carry and no reader needs."""
    return name.endswith(BUFFERS)
