"""The torch reader of the embedding kind."""

from __future__ import annotations

from llmkit.architecture.hooks import Weights
from llmkit.architecture.kinds import Embedding, LearnedPositions, NoPositions, SinusoidalPositions
from llmkit.architecture.positions import sinusoidal_frequencies
from llmkit.decoder.layer_inputs import input_columns
from llmkit.decoder.linear import linear
from llmkit.decoder.norms import build_norm
from llmkit.errors import InputError, RequirementError
from llmkit.lazy_imports import torch


class EmbeddingReader:
    """Rows of the table, scaled, projected, with learned positions, normed: whatever the kind says.

    Attributes:
        weight: the table [vocab, width], which a tied head shares.

    Raises:
        RequirementError: a position kind that is not added to embeddings.
    """

    def __init__(self, kind: Embedding, weights: Weights) -> None:
        self.weight = weights("embed.weight")
        # Rounded to the compute dtype first: the published models were trained that way.
        scale = None if kind.multiplier is None else torch.tensor(kind.multiplier, dtype=self.weight.dtype)
        self._scale = None if scale is None else float(scale)
        self._project = linear(weights, "embed_proj") if weights.has("embed_proj.weight") else None
        self._norm = build_norm(kind.norm, weights.under("embed_norm"))
        self._beside = input_columns(kind.beside, weights.under("beside"))
        self._positions: torch.Tensor | None = None
        self._offset = 0
        self._waves = kind.positions if isinstance(kind.positions, SinusoidalPositions) else None
        if isinstance(kind.positions, LearnedPositions):
            self._positions = weights("positions.weight")
            self._offset = kind.positions.offset
        elif not isinstance(kind.positions, NoPositions | SinusoidalPositions):
            raise RequirementError(f"the torch decoder cannot add {type(kind.positions).__name__} to embeddings")

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, hidden], and what goes beside them, of ids [B, S] at positions [B, S].

        Raises:
            InputError: a sequence is longer than the table of positions.
        """
        from torch.nn.functional import embedding

        x = embedding(ids, self.weight)
        if self._scale is not None:
            x = x * self._scale
        if self._project is not None:
            x = self._project(x)
        if self._positions is not None:
            rows = positions + self._offset
            if int(rows.max()) >= self._positions.shape[0]:
                raise InputError(
                    f"the sequence is {int(positions.max()) + 1} tokens long; the model has learned positions for "
                    f"{self._positions.shape[0] - self._offset}",
                    hint="give a shorter text (eval: fewer shots)",
                )
            x = x + embedding(rows, self._positions)
        if self._waves is not None:
            x = x + _waves(self._waves, positions, x)
        return self._beside(ids, self._norm(x))


def _waves(kind: SinusoidalPositions, positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of positions [B, S], [B, S, hidden], with the dtype and the device of `like`."""
    rows, width = positions + kind.offset, like.shape[-1]
    angles = rows[..., None].float() * torch.tensor(sinusoidal_frequencies(width), device=like.device)
    waves = torch.cat([angles.sin(), angles.cos(), *([torch.zeros_like(angles[..., :1])] if width % 2 else [])], -1)
    if kind.empty_row is not None:
        waves = waves * (rows != kind.empty_row)[..., None]
    return waves.to(like.dtype)
