"""Rotary positions in two dimensions: the place in the prompt and the place in the answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmkit.architecture.frequencies import frequencies
from llmkit.architecture.keys import Key
from llmkit.architecture.kinds import Kind, Rope
from llmkit.architecture.scaling import NoScaling
from llmkit.errors import InputError
from llmkit.lazy_imports import torch

if TYPE_CHECKING:
    from llmkit.architecture.sizes import Sizes
    from llmkit.decoder.kv import Cache, Places
    from llmkit.decoder.positions import Positions
    from llmkit.decoder.scores import Scores
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.graph import Value
    from llmkit.onnx.positions import GraphPositions


@dataclass(frozen=True)
class TwoDimensionalRope(Kind):
    """Two rotary positions, one for each half of a head's dims, halves paired inside each (Du et al. 2022, GLM).

    With C the place of <sop> and m that of the mask: token t has (t, 0) for t < C, and (m, t - C + 1) after. Tokens
    before C are seen by all. Frequencies are rounded to float16, as the original rounds them for every dtype.

    Attributes:
        start, gmask, mask: ids of <sop>, [gMASK] and [MASK].
    """

    start: Key | int
    gmask: Key | int
    mask: Key | int

    def torch_reader(self, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
        """A table of cos and sin for both halves, and what of a sequence all its tokens see."""
        return _reader(self, dims, dtype, device)

    def onnx_feeds(self, ids: list[int]) -> dict[str, int]:
        """The inputs of a graph that depend on a prompt."""
        prefix, mask = _places(self, ids)
        return {"prefix_length": prefix, "mask_position": mask}

    def onnx_emitter(self) -> GraphPositions:
        """The positions of a graph."""
        return _emitter()


def _reader(kind: TwoDimensionalRope, dims: Sizes, dtype: torch.dtype, device: torch.device) -> Positions:
    from llmkit.decoder.positions import Rotary

    class Reader(Rotary):
        exact_sharing_limit = 0  # what stands before <sop> is not the same for a longer prompt

        def table(self, input_ids: torch.Tensor, places: Places, cache: Cache) -> Any:
            """Cos and sin, [B, S, 1, 2, H / 4], and the places of <sop>, [B]."""
            memory = cache.memory
            if "prefix" not in memory:
                places_of = [_places(kind, tokens) for tokens in places.tokens(input_ids)]
                memory["prefix"], memory["mask"] = torch.tensor(places_of, device=device).T
            both = torch.zeros(*input_ids.shape, 2, dtype=torch.int64, device=device)
            for prefix, mask, (row, start, stop) in zip(memory["prefix"], memory["mask"], places.spans, strict=True):
                at = places.positions[row, start:stop]
                both[row, start:stop, 0] = torch.where(at < prefix, at, mask)
                both[row, start:stop, 1] = (at - prefix + 1).clamp_min(0)
            # In float16 the original forms the angles in float16 too.
            inverse = self._inverse.half().to(torch.float16 if dtype is torch.float16 else torch.float32)
            angles = both[:, :, None, :, None].to(inverse.dtype) * inverse
            return angles.cos().to(dtype), angles.sin().to(dtype), memory["prefix"]

        def rotate(self, heads: torch.Tensor, table: Any) -> torch.Tensor:
            return super().rotate(heads.unflatten(-1, (2, -1)), table[:2]).flatten(-2)

        def score(self, scores: Scores, table: Any) -> Scores:
            return replace(scores, prefix=table[2])

    return Reader(Rope(10000.0, NoScaling(), share=0.5), dims, dtype, device)


def _emitter() -> GraphPositions:
    """Two more inputs say of each sequence where <sop> and the mask stand; one rotary op serves each half of a head."""
    from llmkit.onnx.positions import GraphPositions, in_compute_dtype

    class Emitter(GraphPositions):
        def prefix(self, context: GraphContext) -> Any:
            return context.once("prefix", lambda: context.graph.input("prefix_length", "INT64", ["batch_size"]))

        def rotate(self, context: GraphContext, x: Value, n_heads: int) -> Any:
            g, half = context.graph, context.model.dims.head_dim // 2
            tables = context.once("2-D rope", lambda: self._tables(context))
            parts = g.op("Reshape", x, g.ints(0, 0, n_heads, 2, half))
            rotated = []
            for part, (cos, sin) in zip(g.op("Split", parts, g.ints(1, 1), n=2, axis=3), tables, strict=True):
                flat = g.op("Reshape", part, g.ints(0, 0, n_heads * half))
                out = g.op("RotaryEmbedding", flat, cos, sin, num_heads=n_heads)
                rotated.append(g.op("Reshape", out, g.ints(0, 0, n_heads, half)))
            return g.op("Reshape", g.op("Concat", *rotated, axis=3), g.ints(0, 0, n_heads * half * 2))

        def _tables(self, context: GraphContext) -> Any:
            g = context.graph
            exact = frequencies(10000.0, context.model.dims.head_dim // 2, NoScaling())[0]
            inverse = g.constant(exact.astype("float16").astype("float32"))
            prefix = g.op("Unsqueeze", self.prefix(context), g.ints(1))
            mask = g.op("Unsqueeze", g.input("mask_position", "INT64", ["batch_size"]), g.ints(1))
            in_prompt = g.op("Where", g.op("Less", context.positions, prefix), context.positions, mask)
            after = g.op("Sub", g.op("Add", context.positions, g.ints(1)), prefix)
            tables = []
            for at in (in_prompt, g.op("Max", after, g.ints(0))):
                angles = g.op("Mul", g.op("Unsqueeze", g.op("Cast", at, to=1), g.ints(2)), inverse)
                tables.append([in_compute_dtype(context, g.op(function, angles)) for function in ("Cos", "Sin")])
            return tables

    return Emitter()


def _places(kind: TwoDimensionalRope, ids: list[int]) -> tuple[int, int]:
    """The places of <sop> and of the mask in a prompt."""
    hint = "end it with [gMASK] <sop>, as the checkpoint's tokenizer and `--chat` do"
    if kind.start not in ids:
        where = f"(id {kind.start}), where this model starts to answer"
        raise InputError(f"the prompt of {len(ids)} tokens has no <sop> {where}", hint=hint)
    masks = [ids.index(mask) for mask in (kind.gmask, kind.mask) if mask in ids]
    if not masks:
        raise InputError(f"the prompt has neither [gMASK] (id {kind.gmask}) nor [MASK] (id {kind.mask})", hint=hint)
    return ids.index(kind.start), masks[0]
