"""A LoRA adapter from a tuned model: the difference of each linear layer, cut to a low rank.

The best approximation of rank r of D = W_tuned - W_base is B A with the r largest singular triples (Eckart and Young):
A = V_r', B = D V_r, scaling 1 (alpha = r). V comes from the eigenvectors of the smaller Gram matrix (D'D or DD') in
float64, which for matrices of model size costs a fraction of a full SVD and is exact to about 1e-8 of the largest
singular value. The relative error of rank r is sqrt(sum of s_i^2 for i > r / sum of all s_i^2).

What the ranks are, and which tensors changed at all, follows from the data: `survey` reads both models once before the
plan is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llmkit.architecture.names import Names
from llmkit.architecture.registry import DRAFT
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import require_model
from llmkit.checkpoint.embeddings import find_embeddings
from llmkit.errors import InputError, RequirementError, SpecError, listing
from llmkit.lazy_imports import torch
from llmkit.quantization.quality import Meter
from llmkit.tensors.equality import are_equal
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.rearrange import transpose, zeros
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.transforms.lora.peft_checkpoint import peft_checkpoint


@dataclass(frozen=True)
class Survey:
    """What differs between two models.

    Attributes:
        ranks: linear weight -> rank of its approximation.
        saved: other tensors that changed, to be stored whole.
        unchanged: number of tensors that are equal.
    """

    ranks: Mapping[str, int]
    saved: tuple[str, ...]
    unchanged: int


# What a survey finds of one tensor: no difference, one that is stored whole, or the rank of its approximation.
Outcome = Literal["equal", "whole"] | int
Compare = Callable[[str], Outcome]


def _each(names: Sequence[str], compare: Compare) -> Iterable[tuple[str, Outcome]]:
    return ((name, compare(name)) for name in names)


def survey(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    through: Callable[[Sequence[str], Compare], Iterable[tuple[str, Outcome]]] = _each,
) -> Survey:
    """Compare two models tensor by tensor and choose the ranks. Reads all data of both.

    Args:
        rank: the same for every layer (or what its shape allows).
        energy: for each layer the smallest rank that keeps this share of the sum of squared singular values.
        through: calls the comparison for every name, or takes what an interrupted survey of the same two found.

    Raises:
        RequirementError: quantized models, or an architecture that no plugin describes.
        SpecError: two models of different shapes.
    """
    if (rank is None) == (energy is None):
        raise RequirementError("give either a rank or an energy", hint="--rank 16, or --energy 0.9")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise RequirementError("a rank is 1 or more, an energy above 0, at most 1", hint="--rank 16, or --energy 0.9")
    base, tuned = _with_heads(base), _with_heads(tuned)
    linear = frozenset(_linear_names(base, tuned)).difference(_unadapted(base))
    ranks: dict[str, int] = {}
    saved: list[str] = []
    unchanged = 0

    def compare(name: str) -> Outcome:
        return _compared(base.tensors.get(name), tuned.tensors[name], name in linear, rank, energy)

    for name, finding in through(list(tuned.tensors), compare):
        if finding == "equal":
            unchanged += 1
        elif finding == "whole":
            saved.append(name)
        else:
            ranks[name] = finding
    return Survey(ranks, tuple(_with_siblings(tuned, ranks, saved)), unchanged)


def _compared(old: Lazy | None, new: Lazy, is_linear: bool, rank: int | None, energy: float | None) -> Outcome:
    if old is None or old.shape != new.shape:
        return "whole"
    if are_equal(old, new):
        return "equal"
    return _rank(old, new, rank, energy) if is_linear else "whole"


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    found: Survey | None = None,
    meter: Meter | None = None,
) -> Checkpoint:
    """The adapter that makes of `base`, as nearly as the ranks allow, `tuned`; loads in PEFT as it is.

    Args:
        rank: of every layer.
        energy: share of the squared singular values to keep; each layer gets the rank it needs.
        found: a survey made before; otherwise it is made now, which reads the data of both models.
        meter: collects the relative error of every layer while the adapter is written.

    Raises:
        RequirementError: quantized models, an unknown architecture, or two equal models.
        SpecError: two models of different shapes.
    """
    found = found or survey(base, tuned, rank=rank, energy=energy)
    base, tuned = _with_heads(base), _with_heads(tuned)
    if not found.ranks and not found.saved:
        raise RequirementError(f"{tuned.label} and {base.label} are equal: there is nothing to extract")
    modules: dict[str, dict[str, Lazy]] = {}
    flipped = _transposed_names(base)
    for name, r in found.ranks.items():
        module = name.removesuffix(".weight")
        observe = meter.observer(module, r) if meter is not None else None
        old, new = base.tensors[name], tuned.tensors[name]
        if name in flipped:
            old, new = transpose(old), transpose(new)
        low, high = _factors(module, old, new, r, observe)
        modules[module] = {"lora_A": low, "lora_B": high}
    saved = {name: tuned.tensors[name] for name in found.saved}
    if not modules:  # PEFT makes no adapter that adapts no layer
        name = _left_to_adapt(base, tuned, found.saved)
        n_out, n_in = base.tensors[name].shape[:: -1 if name in flipped else 1]
        modules[name.removesuffix(".weight")] = {
            "lora_A": zeros(TensorSpec(DType.F32, (1, n_in))),
            "lora_B": zeros(TensorSpec(DType.F32, (n_out, 1))),
        }
    grown = any(base.tensors[n].shape != t.shape for n, t in saved.items() if n in base.tensors)
    notes = _notes(found, base)
    step = {"transform": "lora.extract", "base": base.label, "tuned": tuned.label, "rank": rank, "energy": energy}
    if base.model is not None:  # PEFT sees what transformers makes
        modules = {base.model.names.loaded(m): parts for m, parts in modules.items()}
        saved = {_loaded(name, base.model.names): t for name, t in saved.items()}
    return peft_checkpoint(
        f"{tuned.label}-lora",
        modules,
        {m: float(p["lora_A"].shape[0]) for m, p in modules.items()},
        config={
            "base_model_name_or_path": base.config.get("_name_or_path") or base.label,
            "fan_in_fan_out": any(name in flipped for name in found.ranks),
        },
        saved=saved,
        files=tuned.tokenizer_files if grown else {},
        step={k: v for k, v in step.items() if v is not None},
        notes=notes,
    )


def _notes(found: Survey, base: Checkpoint) -> list[str]:
    """What differs, and in which form the adapter has it."""
    ranks = sorted(set(found.ranks.values()))
    layers = "no linear layer differs"
    if ranks:
        layers = f"{len(found.ranks)} layers of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    notes = [f"{layers}, {found.unchanged} tensors equal"]
    if found.saved:
        notes.append(f"changed, and stored whole: {listing(found.saved)}")
    if not _unadapted(base).isdisjoint(found.saved):
        notes.append("PEFT puts no adapter on these layers of the family: " + listing(sorted(_unadapted(base)), 1))
    return notes


def _loaded(name: str, names: Names) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{names.loaded(module)}.{leaf}" if module else name


def _with_heads(ckpt: Checkpoint) -> Checkpoint:
    """The checkpoint with its head as a tensor, also where it is the embedding.

    Readers of an adapter that holds a tied embedding alone would leave the old one as the head; both are stored, then.
    """
    embeddings = find_embeddings(ckpt)
    if (
        not embeddings.is_tied
        or embeddings.head is None
        or embeddings.embed is None
        or embeddings.embed not in ckpt.tensors
    ):
        return ckpt
    return replace(ckpt, tensors={**ckpt.tensors, embeddings.head: ckpt.tensors[embeddings.embed]})


def _left_to_adapt(base: Checkpoint, tuned: Checkpoint, saved: Sequence[str]) -> str:
    """A linear weight that lies in no module that PEFT saves whole."""
    modules = {n.rpartition(".")[0]: n for n in reversed(saved) if not n.endswith(".bias")}
    linear = [name for name in _linear_names(base, tuned) if name not in _unadapted(base)]
    for name in linear:
        if not any(name.startswith(f"{module}.") for module in modules):
            return name
    around = next((n for m, n in modules.items() if linear[0].startswith(f"{m}.") and n != linear[0]), linear[0])
    raise RequirementError(
        f"{tuned.label}: {around} changed, and PEFT saves a module whole, with all linear layers in it: none is left "
        "to adapt",
        hint=f"llmkit delta make {base.label} {tuned.label} -o DELTA keeps every difference",
    )


def _transposed_names(ckpt: Checkpoint) -> frozenset[str]:
    """Weights that are stored [in, out]."""
    slots = ckpt.model.tensors() if ckpt.model is not None else {}
    return frozenset(name for name, slot in slots.items() if slot.is_transposed)


def _unadapted(ckpt: Checkpoint) -> frozenset[str]:
    """Weights of linear layers on which PEFT puts no adapter: what changed of them is stored whole."""
    last = ckpt.architecture.unadapted if ckpt.architecture is not None else ()
    return frozenset(name for name in ckpt.tensors if name.removesuffix(".weight").rpartition(".")[2] in last)


def _linear_names(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    for ckpt in (base, tuned):
        require_model(ckpt, "lora extract", floats=True)
    model = base.model
    if model is None:
        raise RequirementError(
            f"{base.label}: no plugin describes its architecture, so its linear layers are not known",
            hint=DRAFT,
        )
    slots = model.tensors()
    missing = [n for n in base.tensors if n not in tuned.tensors and n in slots and not slots[n].is_optional]
    if missing:
        raise SpecError(f"{tuned.label} lacks tensors of {base.label}: {listing(missing)}")
    kinds = ("linear",) if model.is_tied else ("linear", "head")
    names = [n for n, s in slots.items() if s.kind in kinds and len(s.shape) == 2 and n.endswith(".weight")]
    for name in names:
        if name in tuned.tensors and slots[name].kind == "linear":
            shapes = base.tensors[name].shape, tuned.tensors[name].shape
            if shapes[0] != shapes[1]:
                raise SpecError(f"{name} is {list(shapes[0])} in {base.label}, {list(shapes[1])} in {tuned.label}")
    return names


def _with_siblings(tuned: Checkpoint, ranks: dict[str, int], saved: list[str]) -> list[str]:
    """PEFT saves modules whole: all tensors in one go together, but for biases, which may be saved alone."""
    full = dict.fromkeys(saved)
    for name in saved:
        module, _, leaf = name.rpartition(".")
        for other in tuned.tensors if module and leaf != "bias" else ():
            if other.startswith(f"{module}."):
                full.setdefault(other)
                ranks.pop(other, None)
    return list(full)


def _gram(base: Lazy, tuned: Lazy) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The difference in float32, its smaller Gram matrix in float64, and whether that is D'D."""
    delta = tuned.load().float().sub_(base.load().float())
    is_tall = delta.shape[0] >= delta.shape[1]
    wide = delta.double()
    return delta, wide.T @ wide if is_tall else wide @ wide.T, is_tall


def _rank(base: Lazy, tuned: Lazy, rank: int | None, energy: float | None) -> int:
    largest = min(base.shape)
    if rank is not None:
        return min(rank, largest)
    squares = torch.linalg.eigvalsh(_gram(base, tuned)[1]).flip(0).clamp_(min=0)
    kept = torch.cumsum(squares, 0) / squares.sum()
    # A share of 1 would ask for the noise of the eigenvalues too.
    return min(int((kept < (energy or 1.0) - 1e-12).sum()) + 1, largest)


def _factors(module: str, base: Lazy, tuned: Lazy, rank: int, observe: object) -> tuple[Lazy, Lazy]:
    n_out, n_in = base.shape
    specs = (TensorSpec(DType.F32, (rank, n_in)), TensorSpec(DType.F32, (n_out, rank)))

    def fn(w: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        delta = t.double() - w.double()
        if not delta.sum().isfinite():
            raise InputError(
                f"{module}: its weights, or those it was tuned from, hold NaN or infinities, which no low rank holds",
                hint="download them again; where the training diverged, take an earlier checkpoint",
            )
        is_tall = n_out >= n_in
        squares, vectors = torch.linalg.eigh(delta.T @ delta if is_tall else delta @ delta.T)
        chosen = vectors.flip(1)[:, :rank]
        if is_tall:
            low, high = chosen.T, delta @ chosen
        else:
            # A has orthonormal rows here too: U' D = S V', so its rows are scaled back.
            low = chosen.T @ delta
            size = torch.linalg.vector_norm(low, dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float64).tiny)
            low, high = low / size, chosen * size.T
        if callable(observe):
            total = squares.clamp(min=0)
            observe(float(total[: total.shape[0] - rank].sum()), float(total.sum()), rank)
        return low.float().contiguous(), high.float().contiguous()

    node = Apply("extract", [base, tuned], specs, fn, {"rank": rank}, row_step=None, scratch=12.0)
    low, high = node.outputs()
    return low, high
