"""RecurrentGemma's recurrence in ONNX: one Scan over the tokens, float32 in every compute dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkit.onnx.gated import activation
from llmkit.onnx.graph import Graph
from llmkit.onnx.states import (
    back_in_place,
    before_padding,
    past_state,
    present_state,
    real_tokens,
    short_convolution,
)

if TYPE_CHECKING:
    from llmkit.onnx.context import GraphContext
    from llmkit.onnx.weights import GraphWeights

    from .kind import GatedRecurrence


def emit_recurrence(kind: GatedRecurrence, context: GraphContext, weights: GraphWeights, layer: int, x: Any) -> Any:
    """X [B, S, hidden] -> [B, S, hidden]; its states are those of the kind."""
    g, dims = context.graph, context.model.dims
    lru, heads = dims.extra["lru"], dims.heads
    x, real = before_padding(context, x), real_tokens(context)
    u = short_convolution(context, weights, layer, weights.linear(x, "x"))
    split = g.op("Transpose", g.op("Reshape", u, g.ints(0, 0, heads, lru // heads)), perm=[0, 2, 1, 3])

    def gate(name: str) -> Any:
        y = g.op("MatMul", split, weights.value(name))
        y = g.op("Sigmoid", g.op("Add", y, g.op("Unsqueeze", weights.value(f"{name}_bias"), g.ints(1))))
        return g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.ints(0, 0, lru))

    pace = g.op("Mul", g.op("Softplus", weights.single(weights.value("rate"))), g.number(-kind.pace))
    decay = g.op("Mul", g.op("Mul", weights.single(gate("recurrent_gate")), pace), real)
    scale = g.op("Sqrt", g.op("Sub", g.number(1.0), g.op("Exp", g.op("Mul", decay, g.number(2.0)))))
    begun = past_state(context, layer, "begun", [1])
    after = g.op("Add", g.op("CumSum", real, g.ints(1)), g.op("Unsqueeze", begun, g.ints(1)))
    scale = g.op("Where", g.op("Less", after, g.number(2.0)), g.number(1.0), scale)
    added = g.op("Mul", weights.single(g.op("Mul", u, gate("input_gate"))), g.op("Mul", scale, real))
    held, h = g.op(
        "Scan", past_state(context, layer, "scan", [lru]), g.op("Exp", decay), added,
        n=2, body=_token(lru), num_scan_inputs=2, scan_input_axes=[1] * 2, scan_output_axes=[1],
    )  # fmt: skip
    present_state(context, layer, "scan", held, [lru])
    new = g.op("Min", g.op("Add", g.op("ReduceSum", real, g.ints(1), keepdims=0), begun), g.number(1.0))
    present_state(context, layer, "begun", new, [1])
    y = activation(g, str(kind.act), weights.linear(x, "y"))
    return back_in_place(context, weights.linear(g.op("Mul", weights.computed(h), y), "out"))


def _token(width: int) -> Graph:
    """One token: (h, decay, what is added) -> (h, h)."""
    b = Graph("token")
    before, decay, added = (b.input(name, "FLOAT", ["batch_size", width]) for name in ("before", "decay", "added"))
    after = b.op("Add", b.op("Mul", decay, before), added)
    b.output(after, "after", "FLOAT", ["batch_size", width])
    b.output(b.op("Identity", after), "h", "FLOAT", ["batch_size", width])
    return b
