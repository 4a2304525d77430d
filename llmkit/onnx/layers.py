"""The graph reader of MLPs, of residual wirings and of whole layers."""

from __future__ import annotations

from typing import Any

from llmkit.architecture.altup import AltUpBlock
from llmkit.architecture.experts import Experts
from llmkit.architecture.hooks import GraphFunction, Hooks, emitter_of
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import (
    Block,
    GatedMLP,
    NormedResidual,
    OutputNorm,
    Parallel,
    PlainMLP,
    PostNorm,
    PreNorm,
    Residual,
    Sandwich,
    SharedParallel,
)
from llmkit.architecture.layer_inputs import LayerInputBlock
from llmkit.architecture.mamba import MixerOnly
from llmkit.architecture.parallel_experts import OpenSandwich, ParallelExperts
from llmkit.onnx.altup import emit_altup
from llmkit.onnx.attention import emit_attention
from llmkit.onnx.context import GraphContext
from llmkit.onnx.experts import emit_experts, emit_parallel_experts
from llmkit.onnx.gated import activation, gated_mlp
from llmkit.onnx.graph import Value
from llmkit.onnx.layer_inputs import emit_gate
from llmkit.onnx.norms import Stream, emit_norm
from llmkit.onnx.positions import GraphPositions
from llmkit.onnx.weights import GraphWeights


def emit_layer(
    block: Kind, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, stream: Stream
) -> None:
    """One layer on the stream of hidden states."""
    emitter_of(block, _BLOCKS)(context, weights, layer, positions, stream)


def _attention_block(
    block: Block, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions, stream: Stream
) -> None:
    attention, mlp = _branches(block, context, weights, layer, positions)
    emitter_of(block.residual, _RESIDUALS)(block.norm, weights, stream, attention, mlp)


def _branches(
    block: Block, context: GraphContext, weights: GraphWeights, layer: int, positions: GraphPositions
) -> tuple[GraphFunction, Any]:
    """The attention and the MLP of a layer."""

    def scaled(x: Any) -> Any:
        scale = block.branch_scale
        return x if scale is None else context.graph.op("Mul", x, weights.number(scale))

    def attention(x: Any) -> Any:
        with context.graph.scope("attn"):
            return scaled(emit_attention(block.attention, context, weights.under("attn"), layer, positions, x))

    def mlp(*given: Any) -> Any:
        with context.graph.scope("mlp"):
            return scaled(emitter_of(block.mlp, _MLPS)(weights.under("mlp"), *given))

    return attention, mlp


def _altup_block(
    block: AltUpBlock,
    context: GraphContext,
    weights: GraphWeights,
    layer: int,
    positions: GraphPositions,
    stream: Stream,
) -> None:
    def gate(x: Any) -> Any:
        return emit_gate(block.gate, context, weights.under("input"), x)

    emit_altup(block, context, weights, stream, *_branches(block, context, weights, layer, positions), gate)


def _layer_input_block(
    block: LayerInputBlock,
    context: GraphContext,
    weights: GraphWeights,
    layer: int,
    positions: GraphPositions,
    stream: Stream,
) -> None:
    _attention_block(block, context, weights, layer, positions, stream)
    added = emit_gate(block.gate, context, weights.under("input"), stream.value())
    if added is not None:
        stream.add(added)
    if block.scaled:
        stream.replace(context.graph.op("Mul", stream.value(), weights.value("input.scalar")))


def _plain(kind: PlainMLP, weights: GraphWeights, x: Any) -> Any:
    return weights.linear(activation(weights.graph, str(kind.act), weights.linear(x, "up")), "down")


def _sequential(
    kind: Residual, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: Any
) -> None:
    """Norms before attention and MLP, after them, or both; that of the open sandwich is given x besides."""

    branches: dict[str, Any] = {"attn": attention, "mlp": mlp}
    for part, branch in branches.items():
        before, after = f"{part}_norm", f"{part}_post_norm"
        y = stream.normed(norm, weights.under(before)) if before in kind.norms else stream.value()
        out = branch(y, stream.value()) if part == "mlp" and isinstance(kind, OpenSandwich) else branch(y)
        stream.add(emit_norm(norm, weights.under(after), out) if after in kind.norms else out)


def _post_norm(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    stream.add(attention(stream.value()))
    stream.replace(stream.normed(norm, weights.under("attn_norm")))
    stream.add(mlp(stream.value()))
    stream.replace(stream.normed(norm, weights.under("mlp_norm")))


def _normed(
    kind: NormedResidual, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: Any
) -> None:
    for name, branch in (("attn_norm", attention), ("mlp_norm", mlp)):
        y = stream.normed(norm, weights.under(name))
        stream.replace(y if kind.alpha == 1 else weights.graph.op("Mul", y, weights.number(kind.alpha)))
        stream.add(branch(y))


def _mixer_only(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    stream.add(attention(stream.normed(norm, weights.under("attn_norm"))))


def _parallel(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    one = stream.normed(norm, weights.under("attn_norm"))
    other = emit_norm(norm, weights.under("mlp_norm"), stream.value())
    stream.add(attention(one))
    stream.add(mlp(other))


def _shared_parallel(
    kind: Kind, norm: Kind, weights: GraphWeights, stream: Stream, attention: GraphFunction, mlp: GraphFunction
) -> None:
    y = stream.normed(norm, weights.under("attn_norm"))
    stream.add(attention(y))
    stream.add(mlp(y))


_MLPS: Hooks[Value] = {
    ParallelExperts: emit_parallel_experts,
    Experts: emit_experts,
    GatedMLP: gated_mlp,
    PlainMLP: _plain,
}
_RESIDUALS: Hooks[None] = {
    OpenSandwich: _sequential,
    MixerOnly: _mixer_only,
    NormedResidual: _normed,
    PreNorm: _sequential,
    PostNorm: _post_norm,
    OutputNorm: _sequential,
    Parallel: _parallel,
    SharedParallel: _shared_parallel,
    Sandwich: _sequential,
}
_BLOCKS: Hooks[None] = {AltUpBlock: _altup_block, Block: _attention_block, LayerInputBlock: _layer_input_block}
