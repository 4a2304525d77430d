"""The torch reader of mixtures of experts: tokens are sorted by expert, and each expert in use sees its own at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from llmkit.architecture.experts import Experts, Router
from llmkit.architecture.hooks import Hooks, TensorFunction, Weights, reader_of
from llmkit.architecture.keys import as_bool, as_float
from llmkit.architecture.kind import Kind
from llmkit.architecture.parallel_experts import ParallelExperts, ScaledRouter
from llmkit.decoder.gated import gated_mlp
from llmkit.decoder.linear import Linear
from llmkit.decoder.norms import build_norm
from llmkit.lazy_imports import torch

Routes: TypeAlias = "Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]"
"""x [N, hidden] -> the experts of each token, int64 [N, top_k], and their weights in the dtype of x, [N, top_k]."""


def build_router(kind: Kind, weights: Weights) -> Routes:
    """The function of a router kind, with its weights.

    Raises:
        RequirementError: no torch reader for the kind.
    """
    return reader_of(kind, _ROUTERS)(weights)


def experts(kind: Experts, weights: Weights) -> TensorFunction:
    """The function of a mixture of experts.

    Raises:
        RequirementError: no torch reader for the router or the activation.
    """
    mix = mixture(kind, weights)
    return lambda x: mix(x, x)


def mixture(kind: Experts, weights: Weights) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function (what experts are given, what the router sees) -> [B, S, hidden], both of that shape.

    Raises:
        RequirementError: no torch reader for the router or the activation.
    """
    route = build_router(kind.router, weights.under("router"))
    mlps = [gated_mlp(kind, weights.under(f"experts.{e}")) for e in range(kind.n_experts)]
    shared = None if kind.shared is None else gated_mlp(kind, weights.under("shared"))
    gate = Linear(weights("shared_gate.weight"), None) if kind.has_shared_gate else None

    def mix(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen, shares = route(seen.reshape(-1, x.shape[-1]))
        order = chosen.flatten().argsort(stable=True)
        tokens, sorted_shares = order // chosen.shape[1], shares.flatten()[order, None]
        counts = chosen.flatten().bincount(minlength=len(mlps)).tolist()
        used, sizes = [mlp for mlp, n in zip(mlps, counts, strict=True) if n], [n for n in counts if n]
        out = torch.zeros_like(flat)
        for mlp, own, share in zip(used, tokens.split(sizes), sorted_shares.split(sizes), strict=True):
            given = flat[own] * share if kind.weighs == "input" else flat[own]
            made = mlp(given)
            out.index_add_(0, own, made if kind.weighs == "input" else made * share)
        if shared is not None:
            common = shared(flat)
            out += common if gate is None else torch.sigmoid(gate(flat)) * common
        return out.view_as(x)

    return mix


def _router(kind: Router, weights: Weights) -> Routes:
    matrix, bias = weights("weight"), weights("bias") if weights.has("bias") else None
    if kind.is_single:
        matrix, bias = matrix.float(), None if bias is None else bias.float()
    product = Linear(matrix, bias)
    correction = weights("correction").float() if weights.has("correction") else None
    top_k, (groups, top_groups) = kind.n_chosen, kind.choice_of_groups
    scale = as_float(kind.scale)

    def limited(choice: torch.Tensor) -> torch.Tensor:
        """Experts outside the best groups cannot be chosen."""
        grouped = choice.view(len(choice), groups, -1)
        best = grouped.topk(2 if kind.group_score == "top2" else 1, dim=-1).values.sum(-1).topk(top_groups).indices
        outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(outside[..., None], float("-inf")).view_as(choice)

    def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = product(x.to(matrix.dtype)).float()
        function, of_chosen = _FUNCTIONS[kind.scores]
        scores = logits if of_chosen else function(logits)
        choice = scores if correction is None else scores + correction
        chosen = (choice if groups == top_groups else limited(choice)).topk(top_k, dim=-1).indices
        shares = scores.gather(1, chosen)
        shares = function(shares) if of_chosen else shares
        if as_bool(kind.is_normalized):
            shares = shares / (shares.sum(-1, keepdim=True) + kind.epsilon)
        return chosen, (shares * scale).to(x.dtype)

    return route


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


def _sigmoid(logits: torch.Tensor) -> torch.Tensor:
    return logits.sigmoid()


_FUNCTIONS: dict[str, tuple[TensorFunction, bool]] = {
    "softmax": (_softmax, False), "chosen_softmax": (_softmax, True),
    "sigmoid": (_sigmoid, False), "chosen_sigmoid": (_sigmoid, True),
}  # fmt: skip
"""What makes scores of logits, and whether only those of the chosen."""


def _scaled_router(kind: ScaledRouter, weights: Weights) -> Routes:
    product, norm = Linear(weights("weight"), None), build_norm(kind.norm, weights.under("norm"))
    scale, expert_scale = weights("scale"), weights("expert_scale")

    def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = product(norm(x) * scale * x.shape[-1] ** -0.5).float().softmax(-1)
        shares, chosen = scores.topk(kind.n_chosen, dim=-1)
        return chosen, (shares / shares.sum(-1, keepdim=True) * expert_scale[chosen]).to(x.dtype)

    return route


def parallel_experts(kind: ParallelExperts, weights: Weights) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A dense MLP of y = norm(x) and a mixture of experts of x, side by side: (y, x) -> [B, S, hidden]."""
    dense, mix = gated_mlp(kind.dense, weights), mixture(kind.experts, weights)
    names = ("dense_post_norm", "experts_norm", "experts_post_norm")
    post, pre_experts, post_experts = (build_norm(kind.norm, weights.under(name)) for name in names)
    return lambda y, x: post(dense(y)) + post_experts(mix(pre_experts(x), x))


_ROUTERS: Hooks[Routes] = {Router: _router, ScaledRouter: _scaled_router}
