"""The contract of an architecture plugin, checked on tiny random models: names, shapes, caches, prompt, and parity.

Parity is with transformers' class of the same name, for the architectures that it knows; the logits of a plugin that
nothing independent can be compared with are only checked for being the same however they are computed: with a cache,
in a padded batch, packed behind a shared prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.prompts import Instruction, Message, Turns, text_of
from llmkit.architecture.registry import is_claimed
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.decoder.branches import Branches
from llmkit.decoder.kv import KVCache
from llmkit.decoder.load import load_decoder
from llmkit.decoder.model import Decoder
from llmkit.decoder.packed import Packed
from llmkit.decoder.reference import Reference, reference_logits
from llmkit.errors import LlmkitError, PluginError
from llmkit.lazy_imports import torch
from llmkit.pipeline.pool import torch_threads
from llmkit.tensors.lazy import Apply
from llmkit.tensors.spec import DType, TensorSpec

# A clause gives the largest difference of logits, or None where none are compared.
Clause = Callable[["_Case"], float | None]

TOLERANCE = 1e-5
_N_TOKENS = 24


@dataclass(frozen=True)
class Check:
    """One clause of the contract.

    Attributes:
        difference: the largest difference of logits, where logits were compared.
        problem: what is wrong, None when nothing is.
        note: why nothing was compared, where that is no fault.
    """

    name: str
    difference: float | None = None
    problem: str | None = None
    note: str | None = None

    @property
    def is_ok(self) -> bool:
        """True when nothing is wrong."""
        return self.problem is None


def check_architecture(architecture: Architecture, *, of: str = "") -> list[Check]:
    """Every clause whose name has the words `of`, for the tiny model and each of its variants."""
    checks = []
    for variant in (None, *architecture.variants):
        config = architecture.tiny_config(variant)
        checks += [replace(c, name=f"{variant or 'tiny'}: {c.name}") for c in check_config(architecture, config, of=of)]
    if of in "prompt":
        checks.append(run_clause("prompt", partial(_prompt, _Case(architecture, architecture.tiny_config()))))
    return checks


def check_config(architecture: Architecture, config: Mapping[str, Any], *, of: str = "") -> list[Check]:
    """Every clause whose name has the words `of`, for random weights of one config."""
    clauses: dict[str, Clause] = {
        "names and shapes": _names,
        "cached = whole": _cache,
        "padded = whole": _padded,
        "packed = whole": _packed,
        "branches = whole": _branches,
        "transformers' logits": _parity,
        "transformers' padded batch": _padded_parity,
    }
    case = _Case(architecture, config)
    with torch_threads(1):  # tiny models are faster so
        return [run_clause(name, partial(clause, case)) for name, clause in clauses.items() if of in name]


def run_clause(name: str, compute: Callable[[], float | None]) -> Check:
    """A clause: what it computes has to be small, and not to fail."""
    try:
        difference = compute()
    except LlmkitError as error:
        return Check(name, None, error.message)
    except Exception as error:  # noqa: BLE001 - a plugin is foreign code; its failure is the answer
        return Check(name, None, f"{type(error).__name__}: {error}")
    if difference is not None and not difference <= TOLERANCE:
        return Check(name, difference, f"logits differ by {difference:.2g}, allowed is {TOLERANCE:g}")
    return Check(name, difference)


@dataclass(frozen=True)
class _Case:
    """One tiny model, with what several clauses share, computed on first use."""

    architecture: Architecture
    config: Mapping[str, Any]

    @cached_property
    def ckpt(self) -> Checkpoint:
        return random_checkpoint(self.architecture, self.config)

    @cached_property
    def decoder(self) -> Decoder:
        return load_decoder(self.ckpt, architecture=self.architecture)

    @cached_property
    def ids(self) -> torch.Tensor:
        return random_ids(self.architecture, self.config)

    @cached_property
    def whole(self) -> torch.Tensor:
        """Logits of all tokens, computed at once."""
        return self.decoder(self.ids)

    @cached_property
    def stepwise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As many ids as can be computed step by step, and their logits computed at once."""
        limit = self.decoder.exact_sharing_limit
        if not limit or limit >= _N_TOKENS:
            return self.ids, self.whole
        return self.ids[:, :limit], self.decoder(self.ids[:, :limit])

    @cached_property
    def reference(self) -> Reference | None:
        return reference_logits(self.architecture, self.config, self.ckpt)


def random_checkpoint(architecture: Architecture, config: Mapping[str, Any], *, seed: int = 0) -> Checkpoint:
    """A model of that config with small random float32 weights (norm weights near one), made when they are loaded."""
    model = architecture.bind(config)
    tensors = {}
    for i, slot in enumerate(s for s in model.slots.values() if not s.is_optional):

        def make(i: int = i, shape: tuple[int, ...] = slot.shape, kind: str = slot.kind) -> torch.Tensor:
            data = torch.randn(shape, generator=torch.Generator().manual_seed(seed * 10_000 + i))
            # Scaled so that every layer matters and logits are of order one: rounding is then far below the tolerance.
            if kind == "norm":
                return 1 + 0.1 * data
            return data * (0.1 if kind == "bias" or not shape else shape[-1] ** -0.5)

        spec = TensorSpec(DType.F32, slot.shape)
        tensors[slot.name] = Apply("random", [], spec, make, {"seed": seed}, row_step=None, output_rows=[0]).output()
    return Checkpoint(f"tiny {architecture.name}", tensors, dict(config))


def random_ids(architecture: Architecture, config: Mapping[str, Any]) -> torch.Tensor:
    """Token ids [2, T] that the model can read; what every prompt must end with stands after the third."""
    n_vocab = architecture.bind(config).dims.vocab
    return ids_with(architecture.prompt_suffix_of(config), n_vocab, _N_TOKENS, seed=1)


def ids_with(suffix: Sequence[int], n_vocab: int, n_tokens: int, *, seed: int) -> torch.Tensor:
    """Random token ids [2, n_tokens]; after the third stands what every prompt must end with."""
    ids = torch.randint(0, n_vocab, (2, n_tokens), generator=torch.Generator().manual_seed(seed))
    for end in suffix:
        ids[ids == end] = 0
    ids[:, 3 : 3 + len(suffix)] = torch.tensor(suffix, dtype=ids.dtype)
    return ids


def _names(case: _Case) -> None:
    if not is_claimed(case.architecture, case.config):
        raise PluginError("the architecture does not claim the config of its own tiny model")
    model = case.architecture.bind(case.config)
    if faults := model.table.faults(model.slots):
        raise PluginError("; ".join(faults[:3]))
    model.check(case.ckpt.specs).raise_if_bad(case.ckpt.label)


def _prompt(case: _Case) -> None:
    """A format of its own shows the question, once, whatever characters are in it."""
    question = "What is {question} in {input}?"
    prompt = case.architecture.prompt_of(case.config)
    if not isinstance(prompt, Turns | Instruction):
        return
    shown = text_of(prompt.pieces([Message("user", question)]))
    if shown.count(question) != 1:
        raise PluginError(f"the prompt format shows the question {shown.count(question)} times: {shown!r}")


def _cache(case: _Case) -> float | None:
    decoder, (ids, expected) = case.decoder, case.stepwise
    cache = KVCache()
    parts = [decoder(ids[:, :6], cache), *(decoder(ids[:, i : i + 1], cache) for i in range(6, ids.shape[1]))]
    return _difference(torch.cat(parts, 1), expected)


def _padded(case: _Case) -> float | None:
    """A left-padded batch, computed at once and step by step."""
    decoder, (ids, _) = case.decoder, case.stepwise
    short = decoder(ids[:1, 2:])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    at_once = decoder(ids, mask=mask)[:1, 2:]
    cache = KVCache()
    parts = [decoder(ids[:, :8], cache, mask[:, :8]), *(decoder(ids[:, i : i + 1], cache) for i in (8, 9))]
    stepwise = torch.cat(parts, 1)[:1, 2:]
    return max(_difference(at_once, short), _difference(stepwise, short[:, : stepwise.shape[1]]))


def _packed(case: _Case) -> float | None:
    decoder, (ids, expected) = case.decoder, case.stepwise
    if decoder.exact_sharing_limit == 0:
        side_by_side = decoder(torch.cat([ids[:1], ids[1:, :8]], 1), Packed(None, [ids.shape[1], 8]))
        return _difference(side_by_side, torch.cat([expected[:1], decoder(ids[1:, :8])], 1))
    prefix = KVCache()
    decoder.hidden(ids[:1, :6], prefix)
    rest = ids[:1, 6:]
    lengths, tokens = [rest.shape[1], 3], torch.cat([rest, rest[:, :3]], 1)
    logits = decoder(tokens, Packed(prefix, lengths))
    rows = [1, lengths[0] - 1, lengths[0] + 2]
    some = decoder.logits(decoder.hidden(tokens, Packed(prefix, lengths), rows=rows))
    packed = Packed(prefix, lengths, keep=True)
    decoder.hidden(tokens, packed, rows=[])
    after = decoder(rest[:, 3:], packed.segment(1))
    wanted = torch.cat([expected[:1, 6:], expected[:1, 6:9]], 1)
    whole = torch.cat([wanted, wanted[:, rows], expected[:1, 9:]], 1)
    difference = _difference(torch.cat([logits, some, after], 1), whole)
    return (
        max(difference, _continued(decoder, prefix, rest, expected[:1, 6:]))
        if decoder.continues_segments
        else difference
    )


def _continued(decoder: Decoder, prefix: KVCache, rest: torch.Tensor, expected: torch.Tensor) -> float:
    """Segments of one pass that continue each other: the first token, what follows it up to the third, and up to the
    end in two steps; and the first two tokens once more."""
    cuts, parents = [(0, 1), (1, 3), (1, 2), (2, rest.shape[1]), (0, 2)], [-1, 0, 0, 2, -1]
    lengths, tokens = [b - a for a, b in cuts], torch.cat([rest[:, a:b] for a, b in cuts], 1)
    wanted = torch.cat([expected[:, a:b] for a, b in cuts], 1)
    logits = decoder(tokens, Packed(prefix, lengths, parents=parents))
    rows = [0, 2, sum(lengths[:4]) - 1, sum(lengths) - 1]
    some = decoder.logits(decoder.hidden(tokens, Packed(prefix, lengths, parents=parents), rows=rows))
    return _difference(torch.cat([logits, some], 1), torch.cat([wanted, wanted[:, rows]], 1))


def _branches(case: _Case) -> float | None:
    """Tails of two lengths that go on from one prefix step by step, until only the shorter one is left."""
    decoder, (ids, expected) = case.decoder, case.stepwise
    if decoder.exact_sharing_limit == 0:
        return None
    parts, wanted = [], []
    for past in (0, 5):
        prefix = KVCache()
        if past:
            decoder.hidden(ids[:1, :past], prefix)
        rest, after = ids[:1, past:], expected[0, past:]
        packed = Packed(prefix, [3, 1], keep=True)
        decoder.hidden(torch.cat([rest[:, :3], rest[:, :1]], 1), packed)
        branches = Branches([packed], 3)
        parts.append(decoder(torch.stack([rest[0, 3:4], rest[0, 1:2]]), branches)[:, 0])
        branches.keep([1])
        parts += [decoder(rest[:, i : i + 1], branches)[:, 0] for i in (2, 3)]
        wanted += [after[[3, 1]], after[2:3], after[3:4]]
    return _difference(torch.cat(parts), torch.cat(wanted))


def _difference(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest absolute difference, divided by the largest logit if that exceeds 1."""
    return float((actual - wanted).abs().max() / max(1.0, float(wanted.abs().max())))


def _parity(case: _Case) -> float | None:
    """One forward pass over two sequences."""
    return None if case.reference is None else _difference(case.whole, case.reference(case.ids))


def _padded_parity(case: _Case) -> float | None:
    """A batch with padding on the left; None where transformers itself does not see past its padding."""
    theirs, ids = case.reference, case.ids
    if theirs is None:
        return None
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = theirs(ids, mask)
    if _difference(expected[:1, 4:], theirs(ids[:1, 4:])) > TOLERANCE:
        return None
    logits = case.decoder(ids, mask=mask)
    return max(_difference(logits[:1, 4:], expected[:1, 4:]), _difference(logits[1:], expected[1:]))
