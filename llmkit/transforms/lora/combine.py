"""Combining LoRA adapters into one.

Write D_i = s_i B_i A_i for the update of adapter i, s_i = alpha_i / r_i (rsLoRA: alpha_i / sqrt(r_i)), w_i for its
weight. The result has the scaling s: the common s_i where all agree, else 1; its alpha is s * r, never rsLoRA.
Let f_i = w_i s_i / s.

    cat               A = rows of all f_i A_i, B = columns of all B_i: the update is exactly sum w_i D_i; r = sum r_i
    svd               the best approximation of sum w_i D_i of rank r (default: the largest r_i): B = U S / s, A = V'
    linear            A = sum sign(f_i) sqrt|f_i| A_i, B = sum sqrt|f_i| B_i: has the cross terms B_i A_j; equal ranks
    magnitude_prune   each A_i and B_i keeps its int(density * n) largest elements, then as linear
    dare_linear       each element of A_i and B_i is kept with probability density and divided by it, then as linear
    ties              pruned by magnitude; the sign of an element is that of the sum over adapters (0 counts as +); of
                      the elements of that sign, times the factors of linear, the mean (Yadav et al. 2023)
    dare_ties         as ties, pruned as dare_linear (Yu et al. 2023)

These are the formulas of huggingface/peft's add_weighted_adapter (src/peft/tuners/lora/model.py, utils/merge_utils.py)
without what is wrong there: svd multiplies by s_i twice, and rsLoRA is inherited so that the result is scaled by
sqrt(r) once more. One adapter with weight 1 (and density 1) gives that adapter back.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import RequirementError, SpecError, listing, suggestion
from llmkit.formats.adapter import Adapter
from llmkit.lazy_imports import torch
from llmkit.quantization.method import Observe
from llmkit.quantization.quality import Meter
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms.lora.peft_checkpoint import peft_checkpoint

Method = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[str, ...] = get_args(Method)
_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_KEPT_KEYS = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "auto_mapping")


def combine(
    adapters: Sequence[Adapter],
    *,
    method: str = "cat",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    meter: Meter | None = None,
) -> Checkpoint:
    """One adapter made of several, to be written with `save` or merged through `adapter_of`; formulas above.

    Args:
        weights: a factor for each adapter, possibly negative; default 1 for each.
        density: share of elements that pruning keeps, above 0 and at most 1.
        rank: of the result of `svd`.
        seed: of the random pruning; the result depends on nothing else.
        meter: collects what `svd` lost of the sum, layer by layer, while the adapter is written: |D - BA| / |D|.

    Raises:
        RequirementError: adapters that the formulas do not cover (DoRA, other types than LoRA), or options missing.
        SpecError: adapters of different shapes or ranks.
    """
    factors = _checked(adapters, method, weights, density, rank)
    modules: dict[str, dict[str, Lazy]] = {}
    alphas: dict[str, float] = {}
    for path in dict.fromkeys(m for a in adapters for m in a.modules):
        having = [(a, w) for a, w in zip(adapters, factors, strict=True) if path in a.modules]
        parts = [a.modules[path] for a, _ in having]
        names = _part_names(path, parts)
        scalings = [a.scaling[path] for a, _ in having]
        common = scalings[0] if len(set(scalings)) == 1 else 1.0
        shares = [w * s / common for (_, w), s in zip(having, scalings, strict=True)]
        pairs = [(p[names[0]], p[names[1]]) for p in parts]
        _check_shapes(path, method, [a.label for a, _ in having], pairs)
        observe = meter.observer(path, 1) if meter is not None and method == "svd" else None
        combined = _combined(path, pairs, shares, method, density or 1.0, rank, seed, common, observe)
        modules[path] = dict(zip(names, combined, strict=True))
        alphas[path] = common * combined[0].shape[0]
    saved = _saved(adapters)
    first = adapters[0].config
    config: dict[str, Any] = {k: first[k] for k in _KEPT_KEYS if k in first}
    targets = [a.config.get("target_modules") for a in adapters]
    if targets[0] and all(t == targets[0] for t in targets):
        config["target_modules"] = targets[0]
    step = {"transform": "lora.combine", "method": method, "adapters": [a.label for a in adapters],
            "weights": factors, "density": density, "rank": rank, "seed": seed}  # fmt: skip
    ranks = sorted({m[next(iter(m))].shape[0] for m in modules.values()})
    notes = [
        f"{method} of {listing(a.label for a in adapters)}: {len(modules)} modules, rank {listing(map(str, ranks))}"
    ]
    if method == "linear" and len(adapters) > 1:
        notes.append("linear has cross terms between the adapters; cat is the exact sum")
    return peft_checkpoint(
        "+".join(a.label for a in adapters), modules, alphas, config=config, saved=saved, step=step, notes=notes,
        warnings=[w for a in adapters for w in a.warnings],
    )  # fmt: skip


def require_method(method: str) -> None:
    """Refuse what is no method.

    Raises:
        RequirementError: no method has this name.
    """
    if method not in METHODS:
        raise RequirementError(
            f"unknown method {method!r}; expected one of {', '.join(METHODS)}",
            hint=suggestion(method, METHODS, "--method cat is the exact sum", "--method "),
        )


def _checked(
    adapters: Sequence[Adapter], method: str, weights: Sequence[float] | None, density: float | None, rank: int | None
) -> list[float]:
    if not adapters:
        raise RequirementError("no adapter to combine", hint="llmkit lora combine ADAPTER… -o OUT")
    require_method(method)
    factors = [float(w) for w in weights] if weights else [1.0] * len(adapters)
    if len(factors) != len(adapters) or not all(math.isfinite(w) for w in factors):
        raise RequirementError(f"{len(factors)} weights for {len(adapters)} adapters; expected a number for each")
    if method in _PRUNING and (density is None or not 0 < density <= 1):
        raise RequirementError(
            f"{method} keeps a share of the elements, which is {density}; expected above 0, at most 1",
            hint="--density 0.5",
        )
    if method not in _PRUNING and density is not None:
        raise RequirementError(f"{method} prunes nothing: density has no meaning for it")
    if rank is not None and (method != "svd" or rank < 1):
        raise RequirementError("a rank is given for svd only, and is at least 1; the others follow from the adapters")
    for adapter in adapters:
        if (reason := _uncombinable(adapter)) is not None:
            raise RequirementError(
                f"{adapter.label} cannot be combined: {reason}", hint="merge the adapters into the base one by one"
            )
    return factors


def _uncombinable(adapter: Adapter) -> str | None:
    """Why an adapter is not a sum of updates alone, as peft names them; None if it is."""
    parts = {p for parts in adapter.modules.values() for p in parts}
    odd = parts - {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    if adapter.kind != "LORA":
        return f"it is of type {adapter.kind}"
    if adapter.layout != "hf":
        return f"its names ({next(iter(adapter.modules), '')}) are those of another program than peft"
    if "lora_magnitude_vector" in odd:
        return "DoRA rescales each row, which no sum of updates does"
    if odd:
        return f"it holds {listing(sorted(odd))}"
    if adapter.config.get("target_parameters"):
        return "it changes bare parameters (target_parameters)"
    return "it replaces rows of trained tokens" if adapter.tokens else None


def _saved(adapters: Sequence[Adapter]) -> dict[str, Lazy]:
    saved: dict[str, Lazy] = {}
    for adapter in adapters:
        copies = adapter.base_copies
        twice = [p for p in adapter.replacements if p in saved and p not in copies]
        if twice:
            raise RequirementError(
                f"{adapter.label} and another adapter both replace {listing(twice)}: which is to count?",
                hint="merge the adapters into the base one by one, in the order you want",
            )
        for path, lazy in adapter.replacements.items():
            saved.setdefault(path, lazy)
    return saved


def _part_names(path: str, parts: Sequence[Mapping[str, Lazy]]) -> tuple[str, str]:
    kinds = {"lora_embedding_A" in p for p in parts}
    if len(kinds) > 1:
        raise SpecError(f"{path} is an embedding in one adapter and a linear layer in another")
    return ("lora_embedding_A", "lora_embedding_B") if kinds == {True} else ("lora_A", "lora_B")


def _check_shapes(path: str, method: str, labels: Sequence[str], pairs: Sequence[tuple[Lazy, Lazy]]) -> None:
    shapes = [(b.shape[0], a.shape[1]) for a, b in pairs]
    if len(set(shapes)) > 1:
        raise SpecError(
            f"{path}: the updates of {listing(labels)} are {listing(str(list(s)) for s in shapes)}",
            hint="combine adapters of one base: those of another size or vocabulary go into a base of their own",
        )
    ranks = [a.shape[0] for a, _ in pairs]
    if method not in ("cat", "svd") and len(set(ranks)) > 1:
        raise SpecError(
            f"{path}: {method} needs equal ranks; {listing(labels)} have {listing(map(str, ranks))}",
            hint="--method cat or svd combine any ranks",
        )


def _combined(
    path: str,
    pairs: Sequence[tuple[Lazy, Lazy]],
    shares: Sequence[float],
    method: str,
    density: float,
    rank: int | None,
    seed: int,
    scale: float,
    observe: Observe | None,
) -> tuple[Lazy, Lazy]:
    operands = [t for pair in pairs for t in pair]
    dtypes = {t.dtype for t in operands}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else DType.F32
    ranks = [a.shape[0] for a, _ in pairs]
    r = sum(ranks) if method == "cat" else (rank or max(ranks)) if method == "svd" else ranks[0]
    n_out, n_in = pairs[0][1].shape[0], pairs[0][0].shape[1]
    r = min(r, n_out, n_in) if method == "svd" else r
    specs = (TensorSpec(dtype, (r, n_in)), TensorSpec(dtype, (n_out, r)))

    def fn(*data: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = [x.float() for x in data[0::2]], [x.float() for x in data[1::2]]
        if method == "cat":
            factors = _cat(a, b, shares)
        elif method == "svd":
            factors = _svd(a, b, shares, r, observe)
        else:
            factors = _elementwise(a, b, shares, method, density, lambda side, i: _generator(seed, path, side, i))
        return tuple(x.to(dtype.torch).contiguous() for x in factors)

    attrs = {"method": method, "shares": list(shares), "density": density, "rank": r, "seed": seed, "scale": scale}
    node = Apply("combine", operands, specs, fn, attrs, row_step=None, output_rows=[1, 0], scratch=6.0)
    first, second = node.outputs()
    return first, second


Pair = tuple["torch.Tensor", "torch.Tensor"]


def _cat(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], shares: Sequence[float]) -> Pair:
    return torch.cat([x * f for x, f in zip(a, shares, strict=True)]), torch.cat(list(b), dim=1)


def _svd(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], shares: Sequence[float], rank: int, observe: Observe | None
) -> Pair:
    """Through QR of the tall factors, so that the dense update is never formed; in float64."""
    stacked, wide = _cat(a, b, shares)
    q_b, r_b = torch.linalg.qr(wide.double())
    q_a, r_a = torch.linalg.qr(stacked.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    n = min(rank, s.shape[0])
    if observe is not None:
        squares = s.square()
        observe(float(squares[n:].sum()), float(squares.sum()), 1)
    right, left = torch.zeros(rank, stacked.shape[1]), torch.zeros(wide.shape[0], rank)
    right[:n] = (vh[:n] @ q_a.T).float()
    left[:, :n] = (q_b @ (u[:, :n] * s[:n])).float()
    return right, left


def _elementwise(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    shares: Sequence[float],
    method: str,
    density: float,
    generator: Callable[[str, int], torch.Generator],
) -> Pair:
    roots = [math.sqrt(abs(f)) for f in shares]
    signed = [math.copysign(root, f) for root, f in zip(roots, shares, strict=True)]
    combined = []
    for side, tensors, factors in (("A", a, signed), ("B", b, roots)):
        if method in ("ties", "magnitude_prune"):
            tensors = [_largest(x, density) for x in tensors]
        elif method.startswith("dare"):
            tensors = [_dropped(x, density, generator(side, i)) for i, x in enumerate(tensors)]
        stack = torch.stack(list(tensors))
        weighted = stack * torch.tensor(factors).view(-1, 1, 1)
        if not method.endswith("ties"):
            combined.append(weighted.sum(dim=0))
            continue
        elected = torch.where(stack.sum(dim=0) >= 0, 1.0, -1.0)
        agrees = stack.sign() == elected
        combined.append((weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1))
    return combined[0], combined[1]


def _largest(x: torch.Tensor, density: float) -> torch.Tensor:
    if density >= 1:
        return x
    flat = x.reshape(-1)
    kept = torch.topk(flat.abs(), int(density * flat.numel())).indices
    out = torch.zeros_like(flat)
    out[kept] = flat[kept]
    return out.view(x.shape)


def _dropped(x: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    if density >= 1:
        return x
    kept = torch.rand(x.shape, generator=generator) < density
    return x * kept / density


def _generator(seed: int, path: str, side: str, i: int) -> torch.Generator:
    """Random numbers that depend on what is pruned, not on the order in which modules are computed."""
    digest = hashlib.sha256(f"{seed}:{path}:{side}:{i}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
