"""An exported folder as a decoder: ONNX Runtime computes, the caches are those of the torch decoder.

What the graph hands on from one call to the next (keys and values, or a recurrent state) lies in the cache's `memory`,
so that padded batches, continuations and shared prefixes work as they do with torch. Where the op for attention writes
in place, keys and values are buffers with room, bound as past and present at once: nothing is copied from step to step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llmkit.architecture.model import Model
from llmkit.decoder.kv import Cache, KVCache, Places
from llmkit.decoder.packed import Packed
from llmkit.decoder.positions import build_positions, limits
from llmkit.errors import InputError
from llmkit.onnx.binding import BoundSession
from llmkit.onnx.compact import run_compact
from llmkit.onnx.context import IN_PLACE
from llmkit.onnx.opening import PROVIDERS, is_onnx_folder, load_onnx
from llmkit.onnx.parts import Parts

if TYPE_CHECKING:
    import torch

__all__ = ["PROVIDERS", "OrtDecoder", "is_onnx_folder", "load_onnx"]

_SCORES_NBYTES = 256 << 20  # scores and their bias in memory at a time: longer prompts are computed in stretches
_LEAST_STEP = 64
_DTYPES = {"FLOAT": "float32"}
_KNOWN_INPUTS = ("input_ids", "attention_mask", "position_ids")


class OrtDecoder:
    """A session with the interface of `llmkit.decoder.Decoder`.

    Args:
        parts: the graph and its sessions. Where it is not divided, what this calls hidden states are the logits.
        model: the architecture bound to its config; None where no plugin describes it.
        provider: what runs it: cpu or cuda.
        context: the longest sequence it was trained for, where there is no `model` to say it.

    Attributes:
        parts: the same.
        device: where inputs and outputs are.
        n_vocab: the number of tokens.
        runtime: what a run record says of it: provider, version, and the dtype where the graph tells.
    """

    backend = "onnx"

    def __init__(
        self, parts: Parts, model: Model | None = None, *, provider: str = "cpu", context: int | None = None
    ) -> None:
        import torch

        self.parts, self.model, self.device = parts, model, parts.device
        known = parts.metadata
        self.runtime = _runtime(provider, known.get("llmkit.dtype"))
        self._state: dict[str, str] = json.loads(known["llmkit.state"]) if "llmkit.state" in known else _paired(parts)
        self._initial: dict[str, list[float]] = json.loads(known.get("llmkit.initial", "{}"))
        self._pasts = [name for name in self._state if len(parts.inputs[name].shape) == 4]
        self._in_place = known.get("llmkit.attention") in IN_PLACE and bool(self._pasts)
        self._is_compact = self._in_place and known["llmkit.attention"] == "flash"
        self._context = model.dims.context if model is not None else context
        self._heads = model.dims.heads if model is not None else int(parts.inputs[self._pasts[0]].shape[1])
        self.n_vocab = model.dims.vocab if model is not None else int(parts.outputs["logits"].shape[-1])
        kinds: set[Any] = {getattr(block, "position", None) for block in model.blocks} - {None} if model else set()
        self._feeders = [kind for kind in kinds if hasattr(kind, "onnx_feeds")]
        readers = [build_positions(k, model.dims, torch.float32, self.device) for k in kinds] if model else []
        self.exact_sharing_limit, self.rebuilt_past = limits(readers)

    @property
    def context(self) -> int | None:
        """The longest sequence it was trained for, in tokens; None when the config does not say."""
        return self._context

    def new_cache(self, capacity: int = 0) -> KVCache:
        """An empty cache with room for `capacity` tokens at first; it grows by itself."""
        return KVCache(capacity)

    def __call__(
        self, input_ids: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, S, vocab] in float32; see `llmkit.decoder.Decoder.hidden`."""
        return self.logits(self.hidden(input_ids, cache, mask))

    def hidden(
        self, input_ids: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What enters the head, [B, S, hidden]; the logits where the graph was not divided."""
        return self._forward(self.parts.body, input_ids, cache, mask)

    def next_logits(
        self, input_ids: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 logits [B, vocab] after the last column of `input_ids`: in one call, unless there is padding."""
        if not self.parts.is_divided or (self._is_compact and mask is not None and bool((mask == 0).any())):
            return self.logits(self.hidden(input_ids, cache, mask)[:, -1])
        return self._forward(self.parts.last, input_ids, cache, mask)[:, -1]

    def _forward(
        self, session: BoundSession, input_ids: torch.Tensor, cache: Cache | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The first output of a part, for tokens that continue a cache."""
        import torch

        ids = torch.as_tensor(input_ids, device=self.device)
        if ids.dim() != 2 or ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= self.n_vocab:
            raise InputError(
                f"token ids [B, S] must lie in 0..{self.n_vocab - 1}",
                hint="the tokenizer must be the one that belongs to this model",
            )
        with torch.inference_mode():
            used: Any = cache if cache is not None else KVCache(keep=False)
            places = used.begin(ids, mask)
            self._feed_places(ids, places, used)
            if isinstance(used, Packed):
                found = self._packed(session, ids, used, places)
            else:
                past, total = used.length, used.length + ids.shape[1]
                seen = used.mask if used.mask is not None else torch.ones(len(ids), total, device=self.device)
                memory = self._roomy(used.memory, len(ids), past, total, used.capacity)
                found, after = self._run(session, ids, seen.long(), places.positions, memory, past)
                used.memory.update(after)
            used.end()
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [..., vocab] of what `hidden` gave."""
        if not self.parts.is_divided:
            return hidden
        head = self.parts.head
        (name,) = head.inputs
        rows = hidden.reshape(1, -1, hidden.shape[-1]).to(head.dtype_of(name))
        sizes = {"batch_size": 1, "sequence_length": rows.shape[1]}
        return head.run({name: rows}, {}, sizes)["logits"].view(*hidden.shape[:-1], -1)

    def _feed_places(self, ids: torch.Tensor, places: Places, cache: Any) -> None:
        """What a position kind asks for of each sequence, looked up in its first tokens."""
        import torch

        for kind in self._feeders:
            found = [] if cache.memory else [kind.onnx_feeds(tokens) for tokens in places.tokens(ids)]
            for name in found[0] if found else ():
                cache.memory[name] = torch.tensor([f[name] for f in found], device=self.device)

    def _packed(self, session: BoundSession, ids: torch.Tensor, cache: Packed, places: Places) -> torch.Tensor:
        """Segments without padding: one after the other in one buffer, or those of one length as rows of a call."""
        import torch

        kept: list[dict[str, torch.Tensor]] = [{} for _ in cache.lengths]
        pieces: list[torch.Tensor] = [ids] * len(cache.lengths)
        buffers: dict[str, torch.Tensor] = {}
        if self._in_place:
            first = {name: cache.memory[name][:1] for name in self._pasts if name in cache.memory}
            buffers = self._roomy(first, 1, cache.past, cache.past + max(cache.lengths), 0, is_shared=True)
        for chosen in self._groups(cache):
            length = cache.lengths[chosen[0]]
            total = cache.past + length
            cuts = [slice(cache.starts[i], cache.starts[i] + length) for i in chosen]
            rows = torch.cat([ids[:, cut] for cut in cuts])
            at = torch.cat([places.positions[:, cut] for cut in cuts])
            memory = {name: held[chosen] for name, held in cache.memory.items() if name not in buffers} | buffers
            mask = torch.ones(len(chosen), total, dtype=torch.int64, device=self.device)
            found, after = self._run(session, rows, mask, at, memory, cache.past)
            for row, i in enumerate(chosen):
                pieces[i] = found[row : row + 1]
                if cache.keep:
                    whole = {name: held[row : row + 1] for name, held in {**memory, **after}.items()}
                    kept[i] = {n: h[:, :, :total].clone() if n in buffers else h for n, h in whole.items()}
        cache.memory = _stacked(kept) if cache.keep else {}
        return torch.cat(pieces, 1)

    def _groups(self, cache: Packed) -> list[list[int]]:
        """Segments that are computed in one call: of one length, and no more than memory allows."""
        if self._in_place:
            return [[i] for i in range(len(cache.lengths))]
        groups: list[list[int]] = []
        for length in sorted(set(cache.lengths)):
            same = [i for i, n in enumerate(cache.lengths) if n == length]
            total = cache.past + length
            width = sum(int(shape[1]) * int(shape[3]) for shape in (self.parts.inputs[n].shape for n in self._pasts))
            n = max(1, _SCORES_NBYTES // (4 * total * (self._heads * length + width)))
            groups += [same[i : i + n] for i in range(0, len(same), n)]
        return groups

    def _roomy(
        self,
        memory: Mapping[str, torch.Tensor],
        batch: int,
        past: int,
        total: int,
        capacity: int,
        *,
        is_shared: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The memory, its keys and values in buffers of at least `total` tokens where the op writes in place.

        Args:
            is_shared: others hold the same tensors: they are not written to.
        """
        found = dict(memory)
        for name in self._pasts if self._in_place else ():
            held = memory.get(name)
            if held is not None and not is_shared and held.shape[2] >= total and held.is_contiguous():
                continue
            room = max(total, capacity, 2 * held.shape[2] if held is not None and not is_shared else 0)
            found[name] = self._empty(name, batch, room)
            if held is not None:
                found[name][:, :, :past] = held[:, :, :past]
        return found

    def _run(
        self,
        session: BoundSession,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        memory: Mapping[str, Any],
        past: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Hidden states and what the graph hands on: of one call, or of several where one would not do.

        Long prompts are computed in stretches. GroupQueryAttention takes but one row that has a past and several new
        tokens; rows are written into their places in the buffers then.
        """
        import torch

        new = ids.shape[1]
        step = self._stretch(len(ids), past + new)
        if self._is_compact and not bool(mask.all()):
            width = next(iter(session.outputs.values())).shape[-1]
            call, by_row = partial(self._call, session), partial(self._run, session)
            return run_compact(call, by_row, ids, mask, positions, dict(memory), width, in_one=step >= new)
        if self._in_place and len(ids) > 1 and new > 1 and (past or step < new):
            parts = []
            for i in range(len(ids)):
                row = slice(i, i + 1)
                own = {name: held[row] for name, held in memory.items()}
                parts.append(self._run(session, ids[row], mask[row], positions[row], own, past))
            after = {n: memory[n] if n in self._pasts else torch.cat([p[1][n] for p in parts]) for n in parts[0][1]}
            return torch.cat([p[0] for p in parts]), after
        found, after = [], {}
        for start in range(0, new, step):
            cut = slice(start, min(start + step, new))
            seen = past + cut.stop
            held = {**memory, **after}
            part, more = self._call(session, ids[:, cut], mask[:, :seen], positions[:, cut], held, past + start)
            found.append(part)
            after |= more
        return found[0] if len(found) == 1 else torch.cat(found, 1), after

    def _stretch(self, batch: int, total: int) -> int:
        """How many new tokens one call takes: what later tokens change is computed whole."""
        limit = self.exact_sharing_limit
        if limit is not None and total > limit:
            return total
        return max(_LEAST_STEP, _SCORES_NBYTES // (4 * batch * self._heads * total))

    def _call(
        self,
        session: BoundSession,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        memory: Mapping[str, Any],
        past: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        batch = len(ids)
        given = {
            name: feeds[name] if name in feeds else self._held(name, memory, batch, past) for name in session.inputs
        }
        into = {self._state[name]: memory[name] for name in self._pasts} if self._in_place else {}
        sizes = {"batch_size": batch, "sequence_length": ids.shape[1], "total_sequence_length": mask.shape[1]}
        sizes["past_sequence_length + sequence_length"] = mask.shape[1]  # as Optimum calls it
        found = session.run(given, into, sizes)
        first = next(iter(session.outputs))
        return found[first], {name: found[out] for name, out in self._state.items()}

    def _held(self, name: str, memory: Mapping[str, Any], batch: int, past: int) -> torch.Tensor:
        """An input that goes on from call to call; before the first one it is empty, or as the graph says."""
        kept: torch.Tensor | None = memory.get(name)
        if kept is not None:
            return kept if self._in_place or name not in self._pasts else kept[:, :, :past]
        import torch

        if name in self._pasts:
            return self._empty(name, batch, 0)
        empty = self._empty(name, batch)
        values = self._initial.get(name)
        return empty if values is None else empty + torch.tensor(values, device=self.device)[None, :, None]

    def _empty(self, name: str, batch: int, room: int | None = None) -> torch.Tensor:
        """Zeros for an input that goes on from call to call, [B, …]; keys and values with room for some tokens."""
        import torch

        port = self.parts.inputs[name]
        sizes = [batch, *(int(n) for n in port.shape[1:] if not isinstance(n, str))]
        if room is not None:
            sizes.insert(2, room)
        return torch.zeros(sizes, dtype=getattr(torch, port.dtype), device=self.device)


def _runtime(provider: str, dtype: str | None) -> dict[str, str]:
    import onnxruntime

    known = {"provider": provider, "onnxruntime": onnxruntime.__version__}
    return known if dtype is None else known | {"dtype": _DTYPES.get(dtype, dtype.lower())}


def _paired(parts: Parts) -> dict[str, str]:
    """Inputs that go on from call to call and the outputs they go on from, by the names that Optimum gives them.

    Raises:
        InputError: it has an input that nothing here feeds, or keys of a size that it does not state.
    """
    found = {name: name.replace("past_key_values.", "present.", 1) for name in parts.inputs}
    found = {name: out for name, out in found.items() if name != out and out in parts.outputs}
    left = [name for name in parts.inputs if name not in (*_KNOWN_INPUTS, *found)]
    shapes = {name: parts.inputs[name].shape for name in found}
    vague = [n for n, s in shapes.items() if len(s) != 4 or not all(isinstance(size, int) for size in (s[1], s[3]))]
    if left or vague or not found:
        what = f"needs {left[0]}, which nothing feeds" if left else "keeps no past_key_values"
        if vague and not left:
            shape = list(shapes[vague[0]])
            what = f"has {vague[0]} of shape {shape}, expected [batch, heads, past, head size] with numbers"
        raise InputError(f"this graph {what}", hint="llmkit export MODEL --to onnx writes one that can be run")
    return found


def _stacked(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One tensor a name, a row for each segment; shorter caches are filled up, their length is the segment's."""
    import torch

    found = {}
    for name in rows[0]:
        longest = max(row[name].shape[2] if row[name].dim() == 4 else 0 for row in rows)
        parts = []
        for row in rows:
            held = row[name]
            if held.dim() == 4 and held.shape[2] < longest:
                held = torch.nn.functional.pad(held, (0, 0, 0, longest - held.shape[2]))
            parts.append(held)
        found[name] = torch.cat(parts)
    return found
