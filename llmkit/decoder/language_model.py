"""The protocol that scoring and generation need of a model, whatever its backend."""

from __future__ import annotations

from typing import Any, Protocol

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
    def rebuilt_past(self) -> int | None:
        """A sequence that grows past this many tokens must be computed anew; None: never."""

    def new_cache(self, capacity: int = 0) -> Any:
        """An empty cache with room for `capacity` tokens at first."""

    def hidden(self, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What `logits` takes, [B, S, …], of tokens [B, S] that continue `cache`; `mask` [B, past + S]: 1 if real."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits, [..., V]."""

    def next_logits(self, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 logits, [B, V], after the last column: `logits(hidden(…)[:, -1])`."""
