"""The output head: logits in float32 whatever the compute dtype, so that half precision makes no ties."""

from __future__ import annotations

from llmkit.architecture.kinds import Head
from llmkit.decoder.linear import Linear
from llmkit.lazy_imports import torch

# On the CPU a float32 copy of a half-precision head is kept when it is no larger than this: a call for ten rows over
# 49152 x 576 takes 22 instead of 46 ms, which counts where tokens are generated one by one.
_KEPT_NBYTES = 512 * 2**20
_CHUNK_ROWS = 8192  # vocabulary rows widened to float32 at a time: 128 MiB for a hidden size of 4096


class OutputHead:
    """logits = hidden @ weight^T, products and sums in float32; then bias, scale and cap.

    Args:
        kind: the head, bound.
        weight: [vocab, width].
        bias: [vocab] or None.
        project: applied to the hidden states first, or None.
    """

    def __init__(
        self, kind: Head, weight: torch.Tensor, bias: torch.Tensor | None = None, project: Linear | None = None
    ) -> None:
        if kind.is_normalized:
            weight = _normalized(weight)
        is_kept = weight.device.type == "cpu" and weight.numel() * 4 <= _KEPT_NBYTES
        self.weight = weight.float() if is_kept else weight
        self._bias = bias.float() if bias is not None else None
        self._project = project
        self._scale = kind.multiplier
        self._softcap = kind.cap

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._project is not None:
            hidden = self._project(hidden)
        logits = self._product(hidden)
        if self._bias is not None:
            logits += self._bias
        if self._scale is not None:
            logits *= self._scale
        if self._softcap is not None:
            logits = self._softcap * (logits / self._softcap).tanh_()
        return logits

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import linear

        if self.weight.dtype is torch.float32:
            return linear(hidden.float(), self.weight)
        flat = hidden.reshape(-1, hidden.shape[-1]).float()
        out = torch.empty(flat.shape[0], self.weight.shape[0], dtype=torch.float32, device=flat.device)
        for start in range(0, self.weight.shape[0], _CHUNK_ROWS):
            rows = self.weight[start : start + _CHUNK_ROWS].float()
            torch.mm(flat, rows.t(), out=out[:, start : start + rows.shape[0]])
        return out.view(*hidden.shape[:-1], -1)


def _normalized(weight: torch.Tensor) -> torch.Tensor:
    """Rows divided by their L2 norm, in float32, in the dtype that they had."""
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[0], _CHUNK_ROWS):
        rows = weight[start : start + _CHUNK_ROWS].float()
        out[start : start + _CHUNK_ROWS] = torch.nn.functional.normalize(rows, dim=-1).to(weight.dtype)
    return out
