"""The graph reader of mixtures of experts.

ONNX Runtime's `MoE` computes the chosen experts only. Its CPU kernel (1.32, onnxruntime/contrib_ops/cpu/moe/moe_cpu.cc)
has one router, the top k of a softmax over all experts, their shares as they are or divided by their sum (ComputeMoE),
and one gated activation, SwiGLU with rows of gate and up in turn (any other order is refused: line 28; a third matrix,
too). Every other router is brought into that form: the op is given the logarithms of weights that standard operators
made, and its output is multiplied by their sum. `use_sparse_mixer` is accepted there and never read, so it is not used.
`QMoE` is the same with integers of 4 bits, and divides shares by their sum whatever it is told. With 8 bits its CPU
kernel computes with int8 activations at every accuracy level, which is no reference, and its MXFP4 form stops when a
session starts (1.32): both are computed as floats.
Experts with another activation go through a Loop over those that some token has chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.experts import ClampedSwiGLU, Experts, Router
from llmkit.architecture.hooks import Hooks, emitter_of
from llmkit.architecture.keys import as_bool, as_float
from llmkit.architecture.parallel_experts import ParallelExperts, ScaledRouter
from llmkit.architecture.slots import Part, Slot
from llmkit.architecture.storage import part_of, stored
from llmkit.onnx.gated import gated_mlp, gated_product
from llmkit.onnx.graph import CONTRIB, Graph, Value
from llmkit.onnx.integer_matrices import fits_experts
from llmkit.onnx.masks import HIDDEN
from llmkit.onnx.norms import emit_norm
from llmkit.onnx.weights import GraphWeights
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import view_as

_LAYERS = (("gate", "up"), ("down",))
_SMALLEST = 1e-30  # of a weight whose logarithm is taken


def emit_experts(kind: Experts, weights: GraphWeights, x: Value, seen: Value | None = None) -> Any:
    """The mixture of experts of x [B, S, hidden]: [B, S, hidden]; the router sees another value, if one is given.

    Raises:
        RequirementError: no emitter for the router or the activation.
    """
    g = weights.graph
    flat = g.op("Reshape", x, g.ints(-1, weights.model.dims.hidden))
    mix = _looped if _why_no_op(kind) else _fused
    routed = flat if seen is None else g.op("Reshape", seen, g.ints(-1, weights.model.dims.hidden))
    y = g.op("Reshape", mix(kind, weights, flat, routed), g.op("Shape", x))
    if kind.shared is None:
        return y
    common = gated_mlp(kind, weights.under("shared"), x)
    if kind.has_shared_gate:
        common = g.op("Mul", g.op("Sigmoid", weights.linear(x, "shared_gate")), common)
    return g.op("Add", y, common)


def _why_no_op(kind: Experts) -> str | None:
    """What the fused operator cannot compute; None where it can."""
    if not isinstance(kind.act, ClampedSwiGLU) and kind.act != "silu":
        return f"the activation {kind.act}"
    return "weights of what several experts are given" if kind.weighs == "input" and kind.router.n_chosen > 1 else None


def _fused(kind: Experts, weights: GraphWeights, x: Any, seen: Any) -> Any:
    """X [N, hidden] -> [N, hidden] by `MoE`."""
    g, router, factor = weights.graph, kind.router, None
    op, matrices, more = _matrices(kind, weights)
    is_plain = isinstance(router, Router) and kind.weighs == "output" and _is_top_of_softmax(router)
    is_normalized = not is_plain or op == "QMoE" or _is_divided(router)
    if is_plain and is_normalized == _is_divided(router):
        scores = _logits(router, weights, seen)
        factor = weights.number(as_float(router.scale)) if as_float(router.scale) != 1 else None
    else:
        chosen, shares = emit_routes(kind, weights, seen)
        total = g.op("ReduceSum", shares, g.ints(-1), keepdims=1)
        logs = g.op("Log", g.op("Max", g.op("Div", shares, total), g.number(_SMALLEST)))
        shape = g.op("Concat", g.op("Shape", x, end=1), g.ints(kind.n_experts), axis=0)
        others = g.op("Expand", g.number(HIDDEN[weights.dtype]), shape)
        scores = g.op("ScatterElements", others, chosen, logs, axis=1)
        if kind.weighs == "input":
            x = g.op("Mul", x, weights.computed(shares))
        else:
            factor = weights.computed(total)
    act: dict[str, Any] = {"activation_alpha": 1.0, "activation_beta": 0.0}
    if isinstance(kind.act, ClampedSwiGLU):
        act = {"activation_alpha": as_float(kind.act.alpha), "activation_beta": 1.0}
        act["swiglu_limit"] = as_float(kind.act.limit)
    y = g.op(
        op,
        x,
        weights.computed(scores),
        *matrices,
        domain=CONTRIB,
        k=router.n_chosen,
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=int(is_normalized),
        **act,
        **more,
    )
    return y if factor is None else g.op("Mul", y, factor)


def _matrices(kind: Experts, weights: GraphWeights) -> tuple[str, list[Value | None], dict[str, int]]:
    """The operator, what it is given of the experts, and attributes for that."""
    biases = [_stack(kind, weights, parts, "bias") for parts in _LAYERS]
    first, second = (_on_grid(kind, weights, parts) for parts in _LAYERS)
    if first is None or second is None or first.block != second.block:
        stacks = [_stack(kind, weights, parts, "weight") for parts in _LAYERS]
        return "MoE", [value for pair in zip(stacks, biases, strict=True) for value in pair], {}
    matrices = [first.codes, first.scales, biases[0], second.codes, second.scales, biases[1], None, None, None]
    more = {"expert_weight_bits": 4, "block_size": first.block, "accuracy_level": weights.grids.accuracy_level}
    return "QMoE", [*matrices, first.zeros, second.zeros], more


def _is_divided(router: Router) -> bool:
    """Whether the weights of a token's experts sum up to 1 before they are scaled."""
    return as_bool(router.is_normalized) or router.scores == "chosen_softmax"


def _is_top_of_softmax(router: Router) -> bool:
    groups, top_groups = router.choice_of_groups
    is_plain = groups == top_groups and not as_bool(router.correction) and router.epsilon == 0
    return is_plain and router.scores in ("softmax", "chosen_softmax")


def emit_routes(kind: Experts, weights: GraphWeights, x: Value) -> tuple[Value, Value]:
    """The experts of each token of x [N, hidden], int64 [N, top_k], and their weights, float32 [N, top_k].

    Raises:
        RequirementError: no emitter for the router.
    """
    routes: tuple[Value, Value] = emitter_of(kind.router, _ROUTERS)(weights, x)
    return routes


def _logits(kind: Router, weights: GraphWeights, x: Any) -> Any:
    """[N, experts] float32."""
    if kind.is_single and weights.dtype != "FLOAT":
        g = weights.graph
        matrix = g.cast(weights.value("router.weight"), "FLOAT")
        logits = g.op("FusedMatMul", weights.single(x), matrix, domain=CONTRIB, transB=1)
        return g.op("Add", logits, weights.single(weights.value("router.bias"))) if as_bool(kind.bias) else logits
    return weights.single(weights.linear(x, "router"))


def _router(kind: Router, weights: GraphWeights, x: Any) -> tuple[Any, Any]:
    g = weights.graph
    scores = _logits(kind, weights, x)
    is_late = kind.scores.startswith("chosen")

    def weighed(logits: Any) -> Any:
        return g.op("Sigmoid", logits) if kind.scores.endswith("sigmoid") else g.op("Softmax", logits, axis=-1)

    scores = scores if is_late else weighed(scores)
    choice = scores
    if as_bool(kind.correction):
        choice = g.op("Add", choice, weights.single(weights.value("router.correction")))
    groups, top_groups = kind.choice_of_groups
    if groups != top_groups:
        choice = _limited(kind, g, choice)
    _, chosen = g.op("TopK", choice, g.ints(kind.n_chosen), n=2, axis=-1)
    shares = g.op("GatherElements", scores, chosen, axis=1)
    shares = weighed(shares) if is_late else shares
    if as_bool(kind.is_normalized):
        total = g.op("ReduceSum", shares, g.ints(-1), keepdims=1)
        shares = g.op("Div", shares, g.op("Add", total, g.number(kind.epsilon)) if kind.epsilon else total)
    return chosen, shares if as_float(kind.scale) == 1 else g.op("Mul", shares, g.number(as_float(kind.scale)))


def _limited(kind: Router, g: Graph, choice: Any) -> Any:
    """Scores [N, experts] of which those outside the best groups are hidden."""
    groups, top_groups = kind.choice_of_groups
    grouped = g.op("Reshape", choice, g.ints(0, groups, kind.n_experts // groups))
    best, _ = g.op("TopK", grouped, g.ints(2 if kind.group_score == "top2" else 1), n=2, axis=-1)
    _, inside = g.op("TopK", g.op("ReduceSum", best, g.ints(-1), keepdims=0), g.ints(top_groups), n=2, axis=-1)
    ones = g.op("Expand", g.number(1.0), g.op("Shape", inside))
    none = g.op("Expand", g.number(0.0), g.op("Concat", g.op("Shape", choice, end=1), g.ints(groups), axis=0))
    is_inside = g.cast(g.op("Unsqueeze", g.op("ScatterElements", none, inside, ones, axis=1), g.ints(-1)), "BOOL")
    return g.op("Reshape", g.op("Where", is_inside, grouped, g.number(float("-inf"))), g.ints(0, kind.n_experts))


def _scaled_router(kind: ScaledRouter, weights: GraphWeights, x: Any) -> tuple[Any, Any]:
    g, own = weights.graph, weights.under("router")
    normed = g.op("Mul", emit_norm(kind.norm, own.under("norm"), x), own.value("scale"))
    logits = weights.linear(g.op("Mul", normed, weights.number(weights.model.dims.hidden**-0.5)), "router")
    shares, chosen = g.op("TopK", g.op("Softmax", weights.single(logits), axis=-1), g.ints(kind.n_chosen), n=2, axis=-1)
    shares = g.op("Div", shares, g.op("ReduceSum", shares, g.ints(-1), keepdims=1))
    return chosen, g.op("Mul", shares, g.op("Gather", weights.single(own.value("expert_scale")), chosen))


def emit_parallel_experts(kind: ParallelExperts, weights: GraphWeights, y: Any, x: Any) -> Any:
    """A dense MLP of y = norm(x) and a mixture of experts of x, side by side."""

    def normed(name: str, value: Any) -> Any:
        return emit_norm(kind.norm, weights.under(name), value)

    dense = normed("dense_post_norm", gated_mlp(kind.dense, weights, y))
    mixed = emit_experts(kind.experts, weights, normed("experts_norm", x), x)
    return weights.graph.op("Add", dense, normed("experts_post_norm", mixed))


_ROUTERS: Hooks[Any] = {Router: _router, ScaledRouter: _scaled_router}


def _looped(kind: Experts, weights: GraphWeights, x: Any, seen: Any) -> Any:
    """X [N, hidden] -> [N, hidden]: each expert that is chosen takes its tokens, and adds to theirs."""
    g = weights.graph
    chosen, shares = emit_routes(kind, weights, seen)
    shares = weights.computed(shares)
    used = g.op("Unique", chosen)
    zeros = g.op("Expand", g.number(0.0), g.op("Shape", x))  # float32: ScatterND adds no halves on a CPU
    stacks = {
        (part, leaf): _stack(kind, weights, (part,), leaf)
        for part in ("gate", "up", "down")
        for leaf in ("weight", "bias")
    }
    body = Graph("expert", g)
    at = body.input("expert_index", "INT64", [])
    goes_on = body.input("goes_on", "BOOL", [])
    out = body.input("mixture", "FLOAT", ["tokens", weights.model.dims.hidden])
    expert = body.op("Gather", used, at)
    places = body.op("NonZero", body.op("Equal", chosen, expert))  # [2, M]: tokens, and which choice of theirs
    tokens = body.op("Gather", places, body.ints(0))
    share = body.op("Unsqueeze", body.op("GatherND", shares, body.op("Transpose", places)), body.ints(1))
    own = body.op("Gather", x, body.op("Squeeze", tokens, body.ints(0)))

    def linear(given: Any, part: str) -> Any:
        matrix, bias = (stacks[part, leaf] for leaf in ("weight", "bias"))
        made = body.op("FusedMatMul", given, body.op("Gather", matrix, expert), domain=CONTRIB, transB=1)
        return made if bias is None else body.op("Add", made, body.op("Gather", bias, expert))

    own = body.op("Mul", own, share) if kind.weighs == "input" else own
    made = linear(gated_product(body, kind.act, linear(own, "gate"), linear(own, "up")), "down")
    made = body.op("Mul", made, share) if kind.weighs == "output" else made
    made = made if weights.dtype == "FLOAT" else body.cast(made, "FLOAT")
    after = body.op("ScatterND", out, body.op("Transpose", tokens), made, reduction="add")
    body.output(body.op("Identity", goes_on), "goes_on_after", "BOOL", [])
    body.output(after, "mixture_after", "FLOAT", ["tokens", weights.model.dims.hidden])
    return weights.computed(g.op("Loop", g.op("Size", used), None, zeros, body=body))


def _stack(kind: Experts, weights: GraphWeights, parts: Sequence[str], leaf: str) -> Value | None:
    """What the experts have of some layers, [experts, rows, columns] or [experts, rows]; None for no biases.

    Rows of several layers lie in turn. A tensor that the checkpoint stores so is taken as it is.
    """
    if not weights.has(f"experts.0.{parts[0]}.{leaf}"):
        return None
    slots, wanted = _slots(kind, weights, parts, leaf)
    held, groups = next(iter(slots.values())), wanted.groups
    is_alike = held.groups == groups or len(parts) == 1
    if held.stack and not held.is_transposed and is_alike and [part.id for part in held.parts] == list(slots):
        return weights.value(f"experts.0.{parts[0]}.{leaf}")
    own = {id: part_of(weights.restored(slot), slot, id) for id, slot in slots.items()}
    return weights.derived(wanted.name, stored(own, wanted))


def _slots(kind: Experts, weights: GraphWeights, parts: Sequence[str], leaf: str) -> tuple[dict[str, Slot], Slot]:
    """Where the checkpoint has each of the matrices, by id, and the stack of all that the operators take."""
    ids = [f"{weights.stem}experts.{e}.{part}.{leaf}" for e in range(kind.n_experts) for part in parts]
    slots = {id: weights.model.slots[weights.model.stored_in[id]] for id in ids}
    held = slots[ids[0]]
    shape = next(part.shape for part in held.parts if part.id == ids[0])
    groups = shape[0] if len(parts) > 1 else 1
    stack = Slot(
        id="",
        name=f"{weights.stem}experts.{'_'.join(parts)}.{leaf}",
        shape=(kind.n_experts, len(parts) * shape[0], *shape[1:]),
        kind=held.kind,
        parts=tuple(Part(id, shape, shape[0] // groups) for id in ids),
        groups=groups,
        stack=kind.n_experts,
    )
    return slots, stack


@dataclass(frozen=True)
class _Integers:
    """Codes [experts, rows, bytes], scales and packed zero points, and the columns of a block."""

    codes: Value
    scales: Value
    zeros: Value | None
    block: int


def _on_grid(kind: Experts, weights: GraphWeights, parts: Sequence[str]) -> _Integers | None:
    """The matrices of some layers of the experts as integers; None where not all are on one grid that QMoE has."""
    slots, stack = _slots(kind, weights, parts, "weight")
    held = {id: weights.grids.matrices.get(slot.name) for id, slot in slots.items()}
    matrices = {id: integers for id, integers in held.items() if integers is not None}
    grids = {(m.matrix.group, m.matrix.zeros is None) for m in matrices.values()}
    if len(matrices) < len(slots) or len(grids) > 1 or not all(fits_experts(m.matrix) for m in matrices.values()):
        return None

    def stacked(end: str) -> tuple[str, Lazy]:
        rows = {id: integers.parts[f"weight_{end}"] for id, integers in matrices.items()}
        flat = {id: view_as(x, x.dtype, (x.shape[0], x.spec.numel // x.shape[0])) for id, x in rows.items()}
        return f"{stack.name.removesuffix('weight')}{end}", stored(flat, stack)

    block, has_no_zeros = grids.pop()
    zeros = None if has_no_zeros else weights.initializer(*stacked("zeros"))
    return _Integers(weights.initializer(*stacked("codes")), weights.derived(*stacked("scales")), zeros, block)
