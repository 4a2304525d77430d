"""The output head: logits in float32 whatever the compute dtype, so that half precision makes no ties."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["OutputHead"]

# On the CPU a float32 copy of a half-precision head is kept when it is no larger than this: a call for ten rows over
# 49152 x 576 takes 22 instead of 46 ms, which counts where tokens are generated one by one.
_KEPT_NBYTES = 512 * 2**20
_CHUNK_ROWS = 8192  # vocabulary rows widened to float32 at a time: 128 MiB for a hidden size of 4096


class OutputHead:
    """logits = hidden @ weight^T, products and sums in float32."""

    def __init__(self, weight: torch.Tensor) -> None:
        is_kept = weight.device.type == "cpu" and weight.numel() * 4 <= _KEPT_NBYTES
        self.weight = weight.float() if is_kept else weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn.functional import linear

        if self.weight.dtype is torch.float32:
            return linear(hidden.float(), self.weight)
        flat = hidden.reshape(-1, hidden.shape[-1]).float()
        out = torch.empty(flat.shape[0], self.weight.shape[0], dtype=torch.float32, device=flat.device)
        for start in range(0, self.weight.shape[0], _CHUNK_ROWS):
            rows = self.weight[start : start + _CHUNK_ROWS].float()
            torch.mm(flat, rows.t(), out=out[:, start : start + rows.shape[0]])
        return out.view(*hidden.shape[:-1], -1)
