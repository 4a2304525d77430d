"""An exported folder as a decoder: ONNX Runtime computes, the caches are those of the torch decoder.

What the graph hands on from one call to the next (keys and values, or a recurrent state) lies in the cache's `memory`,
so that padded batches, continuations and shared prefixes work as they do with torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.architecture import registry
from llmkit.architecture.model import Model
from llmkit.decoder.kv import Cache, KVCache, Places
from llmkit.decoder.packed import Packed
from llmkit.errors import InputError, RequirementError
from llmkit.formats.folder import read_json
from llmkit.onnx.container import MODEL

if TYPE_CHECKING:
    import torch

__all__ = ["PROVIDERS", "OrtDecoder", "is_onnx_folder", "load_onnx"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def is_onnx_folder(path: Path) -> bool:
    """Whether a folder holds a model that `llmkit export` wrote."""
    return path.is_dir() and (path / MODEL).is_file()


def load_onnx(folder: Path, *, provider: str = "cpu", threads: int | None = None) -> OrtDecoder:
    """The decoder of an exported folder.

    Raises:
        InputError: no such folder, an unknown provider, or a graph that ONNX Runtime cannot load.
        RequirementError: ONNX Runtime is not installed, or has no such provider.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RequirementError(
            "ONNX Runtime is not installed", hint="pip install 'llmkit[cpu]' (or llmkit[gpu]; never both)"
        ) from error
    if provider not in PROVIDERS:
        raise InputError(f"unknown provider {provider!r}", hint=f"one of {', '.join(PROVIDERS)}")
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise RequirementError(
            f"this ONNX Runtime has no provider {provider!r}",
            hint="pip uninstall onnxruntime; pip install 'llmkit[gpu]'" if provider == "cuda" else "reinstall it",
        )
    if not is_onnx_folder(folder):
        raise InputError(f"{folder} holds no {MODEL}", hint="llmkit export MODEL --to onnx -o OUT writes one")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(folder / MODEL), options, providers=[PROVIDERS[provider]])
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"ONNX Runtime cannot load {folder / MODEL}: {first}") from error
    config = read_json(folder / "config.json")
    return OrtDecoder(session, registry.require(config, folder.name).bind(config))


class OrtDecoder:
    """A session with the interface of `llmkit.decoder.Decoder`; what it calls hidden states are the logits.

    Attributes:
        model: the architecture bound to its config.
        session: the ONNX Runtime session.
        device: where its inputs and outputs are.
    """

    def __init__(self, session: Any, model: Model) -> None:
        import torch

        self.session, self.model, self.device = session, model, torch.device("cpu")
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._outputs = [o.name for o in session.get_outputs()]
        known = session.get_modelmeta().custom_metadata_map
        self._one_row = known.get("llmkit.attention") == "gqa"
        self._state: dict[str, str] = json.loads(known.get("llmkit.state", "{}"))
        self._initial: dict[str, list[float]] = json.loads(known.get("llmkit.initial", "{}"))
        kinds: set[Any] = {getattr(block, "position", None) for block in model.blocks}
        self._feeders = [kind for kind in kinds if hasattr(kind, "onnx_feeds")]
        limits = [kind.onnx_sharing_limit for kind in self._feeders if hasattr(kind, "onnx_sharing_limit")]
        self.exact_sharing_limit: int | None = min(limits, default=None)

    @property
    def context(self) -> int | None:
        """The longest sequence it was trained for, in tokens; None when the config does not say."""
        return self.model.dims.context

    def __call__(
        self, input_ids: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, S, vocab] in float32; see `llmkit.decoder.Decoder.hidden`."""
        import torch

        ids = torch.as_tensor(input_ids)
        if ids.dim() != 2 or ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= self.model.dims.vocab:
            raise InputError(f"token ids [B, S] must lie in 0..{self.model.dims.vocab - 1}")
        used: Any = cache if cache is not None else KVCache(keep=False)
        places = used.begin(ids, mask)
        self._feed_places(ids, places, used)
        if isinstance(used, Packed):
            logits = self._packed(ids, used, places)
        else:
            seen = used.mask if used.mask is not None else torch.ones(len(ids), used.length + ids.shape[1])
            logits, after = self._run(ids, seen.long(), places.positions, used.memory, used.length)
            used.memory.update(after)
        used.end()
        return logits

    def hidden(
        self, input_ids: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The logits: the head is part of the graph."""
        return self(input_ids, cache, mask)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `hidden` gave, as it is."""
        return hidden

    def _feed_places(self, ids: torch.Tensor, places: Places, cache: Any) -> None:
        """What a position kind asks for of each sequence, looked up in its first tokens."""
        import torch

        for kind in self._feeders:
            found: list[Mapping[str, int]] = []
            for row, start, stop in places.spans:
                found.append({} if cache.memory else kind.onnx_feeds(ids[row, start:stop].tolist()))
            for name in found[0]:
                cache.memory[name] = torch.tensor([f[name] for f in found])

    def _packed(self, ids: torch.Tensor, cache: Packed, places: Places) -> torch.Tensor:
        """Segments of one length are the rows of one call: nothing is padded."""
        import torch

        before = dict(cache.memory)
        out = torch.empty(1, ids.shape[1], self.model.dims.vocab)
        kept: list[dict[str, torch.Tensor]] = [{} for _ in cache.lengths]
        for length in sorted(set(cache.lengths)):
            chosen = [i for i, n in enumerate(cache.lengths) if n == length]
            starts = [cache.starts[i] for i in chosen]
            rows = torch.stack([ids[0, s : s + length] for s in starts])
            at = torch.stack([places.positions[0, s : s + length] for s in starts])
            memory = {name: held[chosen] for name, held in before.items()}
            logits, after = self._run(rows, torch.ones(len(chosen), cache.past + length).long(), at, memory, cache.past)
            for row, (i, start) in enumerate(zip(chosen, starts, strict=True)):
                out[0, start : start + length] = logits[row]
                kept[i] = {name: held[row : row + 1] for name, held in {**memory, **after}.items()}
        cache.memory = _stacked(kept)
        return out

    def _run(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, memory: Mapping[str, Any], past: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One call, or one for each row where the op takes no batch after the first tokens."""
        import torch

        if self._one_row and past and len(ids) > 1 and ids.shape[1] > 1:
            parts = [
                self._run(ids[i : i + 1], mask[i : i + 1], positions[i : i + 1],
                          {n: m[i : i + 1] for n, m in memory.items()}, past)
                for i in range(len(ids))
            ]  # fmt: skip
            names = parts[0][1]
            return torch.cat([p[0] for p in parts]), {n: torch.cat([p[1][n] for p in parts]) for n in names}
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds |= {name: self._held(name, memory, len(ids), past) for name in self._inputs if name not in feeds}
        given = {n: f.contiguous().numpy() for n, f in feeds.items() if n in self._inputs}
        found = dict(zip(self._outputs, self.session.run(None, given), strict=True))
        logits = torch.from_numpy(found["logits"])
        return logits, {name: torch.from_numpy(found[out]) for name, out in self._state.items()}

    def _held(self, name: str, memory: Mapping[str, Any], batch: int, past: int) -> torch.Tensor:
        """An input that goes on from call to call; before the first one it is empty, or as the graph says."""
        import torch

        shape = self._inputs[name].shape
        if name in memory:
            kept: torch.Tensor = memory[name]
            return kept[:, :, :past] if len(shape) == 4 else kept
        if len(shape) == 4:
            dtype = torch.float16 if self._inputs[name].type == "tensor(float16)" else torch.float32
            return torch.zeros(batch, shape[1], 0, shape[3], dtype=dtype)
        empty = torch.zeros(batch, *shape[1:])
        values = self._initial.get(name)
        return empty if values is None else empty + torch.tensor(values)[None, :, None]


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
