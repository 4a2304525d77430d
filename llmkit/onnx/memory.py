"""State that a graph carries from one call to the next: keys and values, recurrent states, feeds of position kinds.

Where the op for attention writes in place, keys and values are buffers with room for tokens to come. Else each call
takes the past ones and gives longer ones.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from llmkit.errors import InputError
from llmkit.formats.json_text import parse_object
from llmkit.lazy_imports import torch
from llmkit.onnx.context import IN_PLACE
from llmkit.onnx.parts import TOKEN_INPUTS, Parts


class Memory:
    """The inputs of a graph that carry state from call to call.

    Args:
        parts: the graph.

    Attributes:
        state: the output that each of them goes on from, by the name of the input.
        pasts: those that are keys and values, [B, kv_heads, P, head_dim].
        in_place: keys and values are buffers that the graph writes into.
        width: how many numbers the keys and values of a token are.

    Raises:
        InputError: a graph of another program has an input that nothing here feeds, or states no sizes.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, metadata = parts, parts.metadata
        self.state: dict[str, str] = _stated(parts) if "llmkit.state" in metadata else _paired(parts)
        self.pasts = [name for name in self.state if _grows(parts.inputs[name].shape)]
        self.in_place = metadata.get("llmkit.attention") in IN_PLACE and bool(self.pasts)
        self.width = sum(int(parts.inputs[n].shape[1]) * int(parts.inputs[n].shape[3]) for n in self.pasts)
        self._initial = _initial(parts, set(self.state).difference(self.pasts))

    def with_capacity(
        self,
        memory: Mapping[str, torch.Tensor],
        batch: int,
        past: int,
        total: int,
        capacity: int,
        *,
        is_shared: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The memory; where the op writes in place, keys and values [B, kv_heads, room, head_dim] hold `total` tokens.

        Args:
            is_shared: others hold the same tensors: they are not written to.
        """
        buffers = dict(memory)
        for name in self.pasts if self.in_place else ():
            held = memory.get(name)
            if held is not None and not is_shared and held.shape[2] >= total and held.is_contiguous():
                continue
            room = max(total, capacity, 2 * held.shape[2] if held is not None and not is_shared else 0)
            buffers[name] = self._empty(name, batch, room)
            if held is not None:
                buffers[name][:, :, :past] = held[:, :, :past]
        return buffers

    def state_value(self, name: str, memory: Mapping[str, Any], batch: int, past: int) -> torch.Tensor:
        """The value of a state input; before the first call empty, or the initial state in the graph's metadata."""
        kept: torch.Tensor | None = memory.get(name)
        if kept is not None:
            return kept if self.in_place or name not in self.pasts else kept[:, :, :past]
        if name in self.pasts:
            return self._empty(name, batch, 0)
        empty = self._empty(name, batch)
        return empty + self._initial[name] if name in self._initial else empty

    def _empty(self, name: str, batch: int, room: int | None = None) -> torch.Tensor:
        """Zeros for a state input, [B, …]; keys and values with room for `room` tokens."""
        port = self._parts.inputs[name]
        sizes = [batch, *(int(n) for n in port.shape[1:] if not isinstance(n, str))]
        if room is not None:
            sizes.insert(2, room)
        return torch.zeros(sizes, dtype=getattr(torch, port.dtype), device=self._parts.device)


def _stated(parts: Parts) -> dict[str, str]:
    """The pairs of state inputs and outputs that llmkit's own graph states in its metadata."""
    state = parse_object(parts.metadata["llmkit.state"], "the graph's llmkit.state")
    for name, output in state.items():
        if name not in parts.inputs or not isinstance(output, str) or output not in parts.outputs:
            raise _damaged(f"llmkit.state pairs {name!r} with {str(output)[:60]!r}, of which it has not both")
        shape = parts.inputs[name].shape
        if _grows(shape) and not _has_sizes(shape):
            raise _damaged(f"its input {name!r} states no heads or no width")
    return state


def _grows(shape: Sequence[Any]) -> bool:
    """Whether it is that of keys or values, [B, kv_heads, P, head_dim], and of no state of a fixed size."""
    return len(shape) == 4 and not isinstance(shape[2], int)


def _has_sizes(shape: Sequence[Any]) -> bool:
    """Whether it is that of keys or values, and heads and width are numbers."""
    return _grows(shape) and all(isinstance(n, int) and n > 0 for n in (shape[1], shape[3]))


def _initial(parts: Parts, fixed: Container[str]) -> dict[str, float]:
    """What states of a `fixed` size hold at first; keys and values of no token hold nothing."""
    values = parse_object(parts.metadata.get("llmkit.initial", "{}"), "the graph's llmkit.initial")
    for name, number in values.items():
        if name not in fixed:
            raise _damaged(f"llmkit.initial names {name[:60]!r}, which is no state of a fixed size")
        if type(number) not in (int, float):
            raise _damaged(f"llmkit.initial of {name!r} is no number")
    return values


def _damaged(what: str) -> InputError:
    return InputError(f"the graph contradicts itself: {what}", hint="export the model again")


def _paired(parts: Parts) -> dict[str, str]:
    """State inputs and the outputs that continue them, by the names that Optimum gives them.

    Raises:
        InputError: it has an input that nothing here feeds, or keys of a size that it does not state.
    """
    state = {name: name.replace("past_key_values.", "present.", 1) for name in parts.inputs}
    state = {name: out for name, out in state.items() if name != out and out in parts.outputs}
    left = [name for name in parts.inputs if name not in (*TOKEN_INPUTS, *state)]
    shapes = {name: parts.inputs[name].shape for name in state}
    vague = [name for name, shape in shapes.items() if not _has_sizes(shape)]
    if left or vague or not state:
        what = f"needs {left[0]}, which nothing feeds" if left else "keeps no past_key_values"
        if vague and not left:
            shape = list(shapes[vague[0]])
            what = f"has {vague[0]} of shape {shape}, expected [batch, heads, past, head size] with numbers"
        raise InputError(f"this graph {what}", hint="llmkit export MODEL --to onnx writes one that can be run")
    return state


def stacked(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One tensor a name, a row for each segment: [1, ...] each, caches [1, heads, past, size].

    Shorter caches are filled up with zeros; their length is the segment's.
    """
    batch = {}
    for name in rows[0]:
        longest = max(row[name].shape[2] if row[name].dim() == 4 else 0 for row in rows)
        parts = []
        for row in rows:
            held = row[name]
            if held.dim() == 4 and held.shape[2] < longest:
                held = torch.nn.functional.pad(held, (0, 0, 0, longest - held.shape[2]))
            parts.append(held)
        batch[name] = torch.cat(parts)
    return batch
