"""The ranges of keys and values over a text, for an int8 cache: one layer in memory at a time.

Keys are cached after their rotation. In a window of two thousand tokens the slow rotary pairs hardly turn, so that the
range of a channel there says little of places further on; but the length of a pair is the same at every place. The
range of a key channel is therefore that of the group of channels which positions mix, the root of its sum of squares:
no key that differs from those seen by its place alone is clipped. (Measured on SmolLM2: tests/bench/onnx_kv_cache.py.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

from llmkit.architecture.attention import GroupedQuery
from llmkit.architecture.model import Model
from llmkit.calibration.texts import CalibrationText, token_ids, windows
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.decoder.kv import KVCache, Pair
from llmkit.decoder.load import load_decoder
from llmkit.decoder.positions import build_positions
from llmkit.lazy_imports import torch
from llmkit.pipeline.pool import all_cores
from llmkit.tensors.finite import require_finite
from llmkit.tensors.lazy import Context, Node, Rows
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.tensors.stopped import raise_if_stopped

# The largest key and value of a layer by head and channel, [kv_heads, head_dim] each.
Ranges: TypeAlias = "dict[int, tuple[torch.Tensor, torch.Tensor]]"

MOST_TOKENS = 2048
INT8_MOST = 127
# Values of other texts go further than those seen. Measured on SmolLM2, on prose and on code: with a quarter more room
# int8 changes up to a quarter less (Kullback-Leibler divergence). Keys have theirs from the lengths of pairs.
_VALUE_MARGIN = 1.25
_SMALL_NBYTES = 1 << 26  # smaller models are computed sooner in one thread
# A channel that was silent in the text may speak in another one: it gets this share of the widest channel's range.
_LEAST_SHARE = 1e-3


class KeyValueScales(Node):
    """Scales of an int8 cache: for each layer that of keys, then that of values, [kv_heads, 1, head_dim] each.

    Args:
        ckpt: float tensors that the graph computes with.
        tokenized: the checkpoint that has the tokenizer.
        text: what is run through it.
    """

    op = "calibrate"

    def __init__(self, ckpt: Checkpoint, model: Model, tokenized: Checkpoint, text: CalibrationText) -> None:
        self._ckpt, self._model, self._tokenized, self._text = ckpt, model, tokenized, text
        dims = model.dims
        self.inputs = tuple(ckpt.tensors[slot.name] for slot in model.slots.values() if slot.name in ckpt.tensors)
        self._sizes = [_head_sizes(model, layer) for layer in range(dims.layers)]
        self.specs = tuple(
            TensorSpec(DType.F32, (kv_heads, 1, size)) for size, kv_heads in self._sizes for _ in ("keys", "values")
        )
        self.attrs = {"text": text.label, "sha256": text.digest, "tokens": MOST_TOKENS}
        self.n_rows, self.row_step = self.specs[0].n_rows, None

    def output_rows(self, index: int, rows: Rows) -> Rows:
        return (0, self.specs[index].n_rows)

    def evaluate(self, rows: Rows, context: Context) -> tuple[torch.Tensor, ...]:
        ids = token_ids(self._text, load_tokenizer(self._tokenized))[:MOST_TOKENS]
        is_large = sum(lazy.spec.nbytes for lazy in self.inputs) > _SMALL_NBYTES
        with all_cores() if is_large else nullcontext():
            ranges = measure_ranges(load_decoder(self._ckpt, streamed=True), ids, suffix=self._ckpt.prompt_suffix())
        pairs = [  # of a layer without keys of its own: nothing
            ranges.get(layer, (torch.zeros(kv_heads, size),) * 2) for layer, (size, kv_heads) in enumerate(self._sizes)
        ]
        return tuple(_scales(w) for keys, values in pairs for w in (keys, values * _VALUE_MARGIN))

    def peak_nbytes(self, n_rows: int) -> int:
        """Embedding, head and a layer in float32, that layer again while parts are joined, and activations."""
        shared = one = largest = 0
        for slot in self._model.slots.values():
            lazy = self._ckpt.tensors.get(slot.name)
            if lazy is None:
                continue
            nbytes = 4 * lazy.spec.numel
            if slot.id.startswith("layers."):
                one += nbytes if slot.id.startswith("layers.0.") else 0
            else:
                shared += nbytes
            largest = max(largest, lazy.node.peak_nbytes(lazy.node.n_rows))
        dims = self._model.dims
        return shared + 2 * one + largest + 4 * MOST_TOKENS * (8 * dims.hidden + 4 * max(dims.ffn, dims.hidden))


def _head_sizes(model: Model, layer: int) -> tuple[int, int]:
    """The width of a head and the number of heads of a layer's keys."""
    attention = getattr(model.blocks[layer], "attention", None)
    if isinstance(attention, GroupedQuery):
        return attention.head_sizes(model.dims)
    return model.dims.head_dim, model.dims.kv_heads


def _scales(widest: torch.Tensor) -> torch.Tensor:
    """Ranges [kv_heads, head_dim] as scales [kv_heads, 1, head_dim]: the widest value becomes 127."""
    require_finite(widest, widest, name="calibration", what="keys or values of a layer")
    most = float(widest.max())
    floor = most * _LEAST_SHARE if most > 0 else 1.0
    scales: torch.Tensor = (widest.clamp_min(floor) / INT8_MOST).to(torch.float32)
    return scales[:, None].contiguous()


def measure_ranges(decoder: Any, ids: Sequence[int], *, suffix: tuple[int, ...] = ()) -> Ranges:
    """The largest keys and values of a torch decoder over tokens, by layer, head and channel.

    Args:
        decoder: `llmkit.decoder.Decoder`.
        ids: cut into windows of as many tokens as the model takes; what is over after whole windows is left out.
        suffix: ids that every prompt ends with.
    """
    rows = windows(ids, decoder.context or MOST_TOKENS, suffix=suffix)
    cache = _Ranging(_mixing(decoder, suffix))
    decoder.hidden(torch.tensor(rows), cache)
    return cache.ranges


class _Ranging(KVCache):
    """A cache that records the largest keys and values by channel.

    Args:
        mixing: by layer, [head_dim, head_dim]: 1 for channels of keys that positions mix.
    """

    def __init__(self, mixing: Mapping[int, torch.Tensor]) -> None:
        super().__init__(keep=False)
        self.ranges: Ranges = {}
        self._mixing = mixing

    def as_cached(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        raise_if_stopped()
        squares = k.float().square() @ self._mixing[layer]
        self.ranges[layer] = squares.amax((0, 2)).sqrt(), v.float().abs().amax((0, 2))
        return k, v


def _mixing(decoder: Any, suffix: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Which channels of a key its position mixes, by layer: by what the position readers make of unit vectors."""
    model = decoder.model
    kinds = [(decoder.position_kind(i), _head_sizes(model, i)[0]) for i in range(len(model.blocks))]
    masks: dict[Any, torch.Tensor] = {}
    for kind, size in dict.fromkeys(kinds):
        cache, positions = KVCache(keep=False), build_positions(kind, model.dims, torch.float32, decoder.device)
        ids = torch.tensor([[0] * 3 + list(suffix) + [0] * 12])
        table = positions.table(ids, cache.begin(ids, None), cache)
        units = torch.eye(size)[None, None].expand(1, ids.shape[1], size, size).contiguous()
        rotated = positions.rotate(units, table)[0]  # [S, channel of the unit vector, channel]
        masks[kind, size] = (rotated.abs().amax(0) > 0).float()
    return {layer: masks[kind] for layer, kind in enumerate(kinds)}
