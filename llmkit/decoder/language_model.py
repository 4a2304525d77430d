"""The protocol that scoring and generation need of a model, whatever its backend."""

from __future__ import annotations

from typing import Any, Protocol

from llmkit.errors import InputError
from llmkit.lazy_imports import torch


class LanguageModel(Protocol):
    """A model of text: `Decoder` is one, `TransformersDecoder` another."""

    backend: str
    """What computes it, as `--backend` calls it."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def context(self) -> int | None:
        """The longest sequence it was trained for, in tokens; None when the config does not say."""

    @property
    def exact_sharing_limit(self) -> int | None:
        """Longer sequences must not share a prefix; None: all may."""

    @property
    def recompute_beyond(self) -> int | None:
        """A sequence that grows past this many tokens must be computed anew; None: never."""

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why its scores may not be those of a model of text, in words for the user."""

    def new_cache(self, capacity: int = 0) -> Any:
        """An empty cache with room for `capacity` tokens at first."""

    def hidden(self, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What `logits` takes, [B, S, …], of tokens [B, S] that continue `cache`; `mask` [B, past + S]: 1 if real."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits, [..., V]."""

    def next_logits(self, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 logits, [B, V], after the last column: `logits(hidden(…)[:, -1])`."""


class Predictor:
    """The calls that every backend makes of its own `hidden` and `logits`."""

    doubts: tuple[str, ...] = ()

    def __call__(
        self: LanguageModel, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, S, vocab] in float32 of the tokens `input_ids` [B, S]; see `hidden`."""
        return self.logits(self.hidden(input_ids, cache, mask))

    def next_logits(
        self: LanguageModel, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 logits [B, vocab] after the last of the tokens."""
        return self.logits(self.hidden(input_ids, cache, mask)[:, -1])


def token_ids(input_ids: Any, n_vocab: int, device: torch.device) -> torch.Tensor:
    """Token ids [B, S] on a device.

    Raises:
        InputError: another shape, numbers that are not whole, or as of `require_in_vocabulary`.
    """
    ids = torch.as_tensor(input_ids, device=device)
    if ids.dim() != 2 or ids.is_floating_point():
        raise InputError(f"token ids have shape {list(ids.shape)} ({ids.dtype}), expected whole numbers [B, S]")
    require_in_vocabulary(ids, n_vocab)
    return ids


def require_in_vocabulary(ids: torch.Tensor, n_vocab: int) -> None:
    """Refuse ids, of any shape, that have no rows in the embedding.

    Raises:
        InputError: ids outside the vocabulary, or none.
    """
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= n_vocab:
        raise InputError(
            f"token ids must lie in 0..{n_vocab - 1}"
            + (f", found {int(ids.min())}..{int(ids.max())}" if ids.numel() else ", found none"),
            hint="the tokenizer must be the one that belongs to this checkpoint",
        )
