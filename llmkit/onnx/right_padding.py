"""Right-padded batches, for graphs that add no mask to attention scores: padding follows the tokens of each row.

Flash attention takes lengths, not masks. A row's keys lie in its buffer one after the other, whatever padding the
caller has between calls; what a call gives is put where the caller's tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmkit.lazy_imports import torch

if TYPE_CHECKING:
    # (ids [B, S], mask [B, T], positions [B, S], memory, tokens before) -> hidden states and what goes on.
    Call = Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, Any], int], tuple[torch.Tensor, dict[str, torch.Tensor]]
    ]


def run_right_padded(
    call: Call,
    by_row: Call,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    memory: dict[str, torch.Tensor],
    width: int,
    *,
    in_one: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states [B, S, width] of a batch with padding (what stands at padding is zero, or any number), and memory.

    Args:
        call: one call of the graph.
        by_row: the same for a row of its own, in as many calls as it takes.
        ids, positions: [B, S], the new tokens.
        mask: [B, T], 1 for real tokens, past ones included.
        memory: buffers of keys and values [B, ...], which calls write into.
        width: of a hidden state.
        in_one: a prompt may be computed in one call.
    """
    new = ids.shape[1]
    held, real = mask[:, :-new].sum(1), mask[:, -new:] != 0
    counts = real.sum(1)
    if new == 1 and bool(real.all()):
        total = int(held.max()) + 1
        # The lengths are all that attention takes of it; recurrences look for the new token in the last column.
        seen = torch.arange(total, device=ids.device) >= total - 1 - held[:, None]
        return call(ids, seen.long(), positions, memory, total - 1)
    if in_one and int(held.max()) == 0 and int(counts.min()) > 0:
        order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        seen = torch.arange(new, device=ids.device) < counts[:, None]
        hidden, after = call(ids.gather(1, order), seen.long(), positions.gather(1, order), memory, 0)
        return torch.empty_like(hidden).scatter_(1, order[..., None].expand_as(hidden), hidden), after
    out = torch.zeros(len(ids), new, width, device=ids.device)
    states: list[dict[str, torch.Tensor]] = [{} for _ in ids]  # of recurrences: buffers are written in place
    for i, n in enumerate(counts.tolist()):
        if n:
            row, past = slice(i, i + 1), int(held[i])
            row_memory = {name: buffer[row] for name, buffer in memory.items()}
            ones = torch.ones(1, past + n, dtype=torch.int64, device=ids.device)
            hidden, after = by_row(ids[row, real[i]], ones, positions[row, real[i]], row_memory, past)
            out = out.to(hidden.dtype)
            out[i, real[i]] = hidden[0]
            states[i] = {name: held for name, held in after.items() if held is not row_memory.get(name)}
    started = next((state for state in states if state), {})
    joined = {}
    for name, held in started.items():
        empty = memory[name] if name in memory else torch.zeros_like(held).expand(len(ids), *held.shape[1:])
        joined[name] = torch.cat([state.get(name, empty[i : i + 1]) for i, state in enumerate(states)])
    return out, memory | joined
