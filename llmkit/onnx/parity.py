"""The check after an export: the folder's logits against the torch decoder's, on random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["TOLERANCES", "Difference", "compare_decoders"]

# By compute dtype: what rounding leaves of logits of order one. Half precision rounds at every node.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_N_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Difference:
    """One comparison.

    Attributes:
        case: what was computed.
        largest: the largest difference of logits, relative to the largest logit where that is above one.
        same_choice: share of places with the same most likely token.
    """

    case: str
    largest: float
    same_choice: float


def compare_decoders(found: Any, wanted: Any, *, ends: tuple[int, ...] = (), seed: int = 0) -> list[Difference]:
    """Prefill, cached steps, and a batch with padding on the left.

    Args:
        found: the decoder to check.
        wanted: the one to check against.
        ends: ids that every prompt must hold (`Architecture.prompt_ends`).
        seed: of the token ids.
    """
    import torch

    from llmkit.decoder.cache import KVCache

    ids = torch.randint(0, wanted.model.dims.vocab, (2, _N_TOKENS), generator=torch.Generator().manual_seed(seed))
    for end in ends:
        ids[ids == end] = 0
    ids[:, 3 : 3 + len(ends)] = torch.tensor(ends, dtype=ids.dtype)
    whole = wanted(ids)

    def steps(decoder: Any) -> torch.Tensor:
        cache = KVCache()
        parts = [decoder(ids[:, :8], cache)]
        parts += [decoder(ids[:, i : i + 1], cache) for i in range(8, 12)]
        return torch.cat(parts, 1)

    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padded = wanted(ids, mask=mask), found(ids, mask=mask)
    return [
        _difference("prefill", found(ids), whole),
        _difference("cached steps", steps(found), steps(wanted)),
        _difference("left-padded row", padded[1][:1, 2:], padded[0][:1, 2:]),
        _difference("row beside it", padded[1][1:], padded[0][1:]),
    ]


def _difference(case: str, found: torch.Tensor, wanted: torch.Tensor) -> Difference:
    scale = max(1.0, float(wanted.abs().max()))
    same = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
    return Difference(case, float((found - wanted).abs().max()) / scale, same)
