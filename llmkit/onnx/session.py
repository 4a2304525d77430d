"""An exported folder as a decoder: ONNX Runtime computes, the caches are those of the torch decoder.

What the graph hands on from one call to the next (keys and values, or a recurrent state) lies in the cache's `memory`,
so that padded batches, continuations and shared prefixes work as they do with torch. Where the op for attention writes
in place, keys and values are buffers with room, bound as past and present at once: nothing is copied from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmkit.architecture.hooks import FeedsGraph
from llmkit.architecture.model import Model
from llmkit.decoder.kv import Cache, KVCache, Places
from llmkit.decoder.language_model import Predictor, token_ids
from llmkit.decoder.packed import Packed
from llmkit.decoder.positions import build_positions, limits
from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.onnx.binding import BoundSession
from llmkit.onnx.memory import Memory, stacked
from llmkit.onnx.parts import Parts, torch_name
from llmkit.onnx.right_padding import run_right_padded

_LEAST_STEP = 64


class OrtDecoder(Predictor):
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
        scores_nbytes: memory for attention scores and their bias; longer prompts are computed in stretches.
    """

    backend = "onnx"

    def __init__(
        self, parts: Parts, model: Model | None = None, *, provider: str = "cpu", context: int | None = None
    ) -> None:
        self.parts, self.model, self.device = parts, model, parts.device
        self.scores_nbytes = 256 << 20
        metadata = parts.metadata
        self.runtime = _runtime(provider, metadata.get("llmkit.dtype"))
        self._memory = Memory(parts)
        self._pads_right = self._memory.in_place and metadata["llmkit.attention"] == "flash"
        self._context = model.dims.context if model is not None else context
        self._is_one_row = any(port.shape[:1] == (1,) for port in parts.inputs.values())
        self._heads = model.dims.heads if model is not None else int(parts.inputs[self._memory.pasts[0]].shape[1])
        self.n_vocab = model.dims.vocab if model is not None else int(parts.outputs["logits"].shape[-1])
        kinds: set[Any] = {getattr(block, "position", None) for block in model.blocks} - {None} if model else set()
        self._feeders = [kind for kind in kinds if isinstance(kind, FeedsGraph)]
        readers = [build_positions(k, model.dims, torch.float32, self.device) for k in kinds] if model else []
        self.exact_sharing_limit, self.recompute_beyond = limits(readers)

    @property
    def context(self) -> int | None:
        """The longest sequence it was trained for, in tokens; None when the config does not say."""
        return self._context

    def new_cache(self, capacity: int = 0) -> KVCache:
        """An empty cache with room for `capacity` tokens at first; it grows by itself."""
        return KVCache(capacity)

    def hidden(
        self, input_ids: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What enters the head, [B, S, hidden]; the logits where the graph was not divided."""
        return self._forward(self.parts.body, input_ids, cache, mask)

    def next_logits(
        self, input_ids: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 logits [B, vocab] after the last column of `input_ids`: in one call, unless there is padding."""
        if not self.parts.is_divided or (self._pads_right and mask is not None and bool((mask == 0).any())):
            return super().next_logits(input_ids, cache, mask)
        return self._forward(self.parts.last, input_ids, cache, mask)[:, -1]

    def _forward(
        self, session: BoundSession, input_ids: torch.Tensor, cache: Cache | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The first output of a part, for tokens that continue a cache."""
        ids = token_ids(input_ids, self.n_vocab, self.device)
        with torch.inference_mode():
            used: Any = cache if cache is not None else KVCache(keep=False)
            places = used.begin(ids, mask)
            self._feed_places(ids, places, used)
            if isinstance(used, Packed):
                hidden = self._packed(session, ids, used, places)
            else:
                past, total = used.length, used.length + ids.shape[1]
                if used.mask is not None:
                    seen = used.mask.long()
                else:
                    seen = torch.ones(len(ids), total, dtype=torch.int64, device=self.device)
                memory = self._memory.with_capacity(used.memory, len(ids), past, total, used.capacity)
                hidden, after = self._run(session, ids, seen, places.positions, memory, past)
                used.memory.update(after)
            used.end()
        return hidden

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
        for kind in self._feeders:
            feeds = [] if cache.memory else [kind.onnx_feeds(tokens) for tokens in places.tokens(ids)]
            for name in feeds[0] if feeds else ():
                cache.memory[name] = torch.tensor([f[name] for f in feeds], device=self.device)

    def _packed(self, session: BoundSession, ids: torch.Tensor, cache: Packed, places: Places) -> torch.Tensor:
        """Segments without padding: one after the other in one buffer, or those of equal length as rows of one call."""
        kept: list[dict[str, torch.Tensor]] = [{} for _ in cache.lengths]
        pieces: list[torch.Tensor] = [ids] * len(cache.lengths)
        buffers: dict[str, torch.Tensor] = {}
        if self._memory.in_place:
            first = {name: cache.memory[name][:1] for name in self._memory.pasts if name in cache.memory}
            buffers = self._memory.with_capacity(
                first, 1, cache.past, cache.past + max(cache.lengths), 0, is_shared=True
            )
        for chosen in self._groups(cache):
            length = cache.lengths[chosen[0]]
            total = cache.past + length
            cuts = [slice(cache.starts[i], cache.starts[i] + length) for i in chosen]
            rows = torch.cat([ids[:, cut] for cut in cuts])
            at = torch.cat([places.positions[:, cut] for cut in cuts])
            memory = {name: held[chosen] for name, held in cache.memory.items() if name not in buffers} | buffers
            mask = torch.ones(len(chosen), total, dtype=torch.int64, device=self.device)
            hidden, after = self._run(session, rows, mask, at, memory, cache.past)
            for row, i in enumerate(chosen):
                pieces[i] = hidden[row : row + 1]
                if cache.keep:
                    state = {name: held[row : row + 1] for name, held in {**memory, **after}.items()}
                    kept[i] = {n: h[:, :, :total].clone() if n in buffers else h for n, h in state.items()}
        cache.memory = stacked(kept) if cache.keep else {}
        return torch.cat(pieces, 1)

    def _groups(self, cache: Packed) -> list[list[int]]:
        """Segments that are computed in one call: of one length, and no more than memory allows."""
        if self._memory.in_place or self._is_one_row:
            return [[i] for i in range(len(cache.lengths))]
        groups: list[list[int]] = []
        for length in sorted(set(cache.lengths)):
            same = [i for i, n in enumerate(cache.lengths) if n == length]
            total = cache.past + length
            n = max(1, self.scores_nbytes // (4 * total * (self._heads * length + self._memory.width)))
            groups += [same[i : i + n] for i in range(0, len(same), n)]
        return groups

    def _run(
        self,
        session: BoundSession,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        memory: Mapping[str, Any],
        past: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Hidden states and the state after one call, or after several where the op cannot compute all in one.

        Long prompts are computed in stretches. GroupQueryAttention takes but one row that has a past and several new
        tokens; rows are written into their places in the buffers then.
        """
        new = ids.shape[1]
        step = self._stretch(len(ids), past + new)
        if self._pads_right and not bool(mask.all()):
            width = next(iter(session.outputs.values())).shape[-1]
            call, by_row = partial(self._call, session), partial(self._run, session)
            return run_right_padded(call, by_row, ids, mask, positions, dict(memory), width, in_one=step >= new)
        in_place = self._memory.in_place
        if len(ids) > 1 and (self._is_one_row or (in_place and new > 1 and (past or step < new))):
            parts = []
            for i in range(len(ids)):
                row = slice(i, i + 1)
                row_memory = {name: held[row] for name, held in memory.items()}
                parts.append(self._run(session, ids[row], mask[row], positions[row], row_memory, past))
            after = {
                n: memory[n] if in_place and n in self._memory.pasts else torch.cat([p[1][n] for p in parts])
                for n in parts[0][1]
            }
            return torch.cat([p[0] for p in parts]), after
        pieces, after = [], {}
        for start in range(0, new, step):
            cut = slice(start, min(start + step, new))
            seen = past + cut.stop
            held = {**memory, **after}
            part, more = self._call(session, ids[:, cut], mask[:, :seen], positions[:, cut], held, past + start)
            pieces.append(part)
            after |= more
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1), after

    def _stretch(self, batch: int, total: int) -> int:
        """How many new tokens one call takes: what later tokens change is computed whole."""
        limit = self.exact_sharing_limit
        if limit is not None and total > limit:
            return total
        return max(_LEAST_STEP, self.scores_nbytes // (4 * batch * self._heads * total))

    def _call(
        self,
        session: BoundSession,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        memory: Mapping[str, Any],
        past: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if "attention_mask" not in session.inputs and not bool(mask.all()):
            raise InputError(
                "this graph takes no attention_mask, so no texts of several lengths beside each other",
                hint="llmkit export MODEL --to onnx -o OUT writes one that does",
            )
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: feed.to(session.dtype_of(name)) for name, feed in feeds.items() if name in session.inputs}
        batch = len(ids)
        inputs = {
            name: feeds[name] if name in feeds else self._memory.state_value(name, memory, batch, past)
            for name in session.inputs
        }
        into = {self._memory.state[name]: memory[name] for name in self._memory.pasts} if self._memory.in_place else {}
        sizes = {"batch_size": batch, "sequence_length": ids.shape[1], "total_sequence_length": mask.shape[1]}
        sizes["past_sequence_length + sequence_length"] = mask.shape[1]  # as Optimum calls it
        outputs = session.run(inputs, into, sizes)
        first = outputs[next(iter(session.outputs))] if self.parts.is_divided else outputs["logits"].float()
        return first, {name: outputs[out] for name, out in self._memory.state.items()}


def _runtime(provider: str, dtype: str | None) -> dict[str, str]:
    import onnxruntime

    facts = {"provider": provider, "onnxruntime": onnxruntime.__version__}
    return facts if dtype is None else facts | {"dtype": torch_name(dtype)}
