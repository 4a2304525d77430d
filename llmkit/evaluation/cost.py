"""What a forward of llmkit's decoder costs on paper: arithmetic for the time that is left, bytes for a batch that fits.

Counted are the matrix products. A token takes two operations for each weight of the layers, and four for each value of
a query head and each token before it (scores, then their products with values).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

from llmkit.architecture.model import Model
from llmkit.architecture.sizes import Sizes
from llmkit.errors import InputError, counted
from llmkit.tensors.spec import format_bytes

_PROCESS_NBYTES = 700 << 20  # a process that has imported torch, transformers and lm-eval, and read a benchmark
_LOGITS_COPIES = 3  # float32 logits, their log-softmax, and the piece before it that is being freed
_LEAST_TOKENS = 16
_KEPT_RATIO = 4  # tokens held in caches for each token of a batch
_PATH = 2  # batches of caches on the way from the root of the tree to what is being computed, beside their copies


@runtime_checkable
class _SeesAll(Protocol):
    """Attention to every earlier token; what has a state of one size instead takes nothing for a pair of tokens."""

    def widths(self, dims: Sizes) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Batch:
    """Limits of one forward and of the caches.

    Attributes:
        tokens: of one forward.
        kept_tokens: of the caches that forwards beside each other leave behind.
        logits_nbytes: of their float32 logits.
    """

    tokens: int
    kept_tokens: int
    logits_nbytes: int


@dataclass(frozen=True)
class Costs:
    """Of one model in one compute dtype.

    Attributes:
        token_flop: for each token, outside attention.
        pair_flop: for each token and each token that it sees.
        weights_nbytes: of all weights.
        cache_nbytes: of the keys and values of one token.
        work_nbytes: of what is alive at the widest place of a layer, for each token of a forward.
        logits_nbytes: float32 logits of one token.
    """

    token_flop: int
    pair_flop: int
    weights_nbytes: int
    cache_nbytes: int
    work_nbytes: int
    logits_nbytes: int

    @classmethod
    def of(cls, model: Model, itemsize: int) -> Costs:
        """Of a model whose weights and activations take `itemsize` bytes each."""
        dims = model.dims
        kinds = [getattr(block, "attention", None) for block in model.blocks]
        widths = [kind.widths(dims) for kind in kinds if isinstance(kind, _SeesAll)]
        queries, kept = [width for width, _ in widths], sum(width for _, width in widths)
        in_layers = [(prod(s.shape), s.layer, s.id) for s in model.slots.values() if s.layer is not None]
        others = [prod(s.shape) for s in model.slots.values() if s.layer is None and not s.is_optional]
        used = [n * model.blocks[layer].usage(slot.partition(f"layers.{layer}.")[2]) for n, layer, slot in in_layers]
        # gate, up and their product; or queries, repeated keys and values, outputs
        wide = max(3 * dims.ffn, 6 * max(queries, default=dims.hidden))
        return cls(
            token_flop=int(2 * sum(used)),
            pair_flop=4 * sum(queries),
            weights_nbytes=(sum(n for n, _, _ in in_layers) + sum(others)) * itemsize,
            cache_nbytes=kept * itemsize,
            # what is kept of a row while it is computed, and cut into caches after it
            work_nbytes=(3 * dims.hidden + wide) * itemsize,
            logits_nbytes=4 * dims.vocab,
        )

    def flop(self, start: int, stop: int) -> int:
        """Of the tokens from `start` to `stop` of a sequence."""
        n = stop - start
        return n * self.token_flop + self.pair_flop * (n * (start + stop + 1) // 2)

    def peak_nbytes(self, batch: Batch, longest: int, streams: int = 1) -> int:
        """What a process takes at most that scores sequences of up to `longest` tokens with such batches.

        Args:
            streams: forwards beside each other.
        """
        kept = max(batch.kept_tokens, streams * longest)
        computed = streams * batch.tokens * (self.work_nbytes + 2 * self.cache_nbytes)
        held = computed + (_PATH + 1) * kept * self.cache_nbytes
        return _PROCESS_NBYTES + self.weights_nbytes + held + _LOGITS_COPIES * batch.logits_nbytes

    def fit(self, nbytes: int, longest: int, most: Batch, streams: int = 1) -> Batch:
        """The largest batch, `most` at most, with which a process stays below `nbytes`.

        Raises:
            InputError: the smallest does not.
        """
        batch = most
        while (peak := self.peak_nbytes(batch, longest, streams)) > nbytes:
            if batch.tokens <= _LEAST_TOKENS:
                raise InputError(
                    f"--memory {format_bytes(nbytes)} is too little: the weights take "
                    f"{format_bytes(self.weights_nbytes)}, and prompts of {counted(longest, 'token')} bring it to "
                    f"{format_bytes(peak)}",
                    hint=f"--memory {-(-peak // 2**20)}MiB",
                )
            tokens = max(_LEAST_TOKENS, batch.tokens // 2)
            logits = max(8 * self.logits_nbytes, min(batch.logits_nbytes, most.logits_nbytes * tokens // most.tokens))
            batch = Batch(tokens, min(batch.kept_tokens, _KEPT_RATIO * tokens), logits)
        return batch
