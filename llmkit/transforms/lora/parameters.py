"""LoRA on bare parameters (`target_parameters`): stacked experts, whose base may store them stacked or one by one.

PEFT wraps the module that owns a parameter, once for each: `experts.base_layer.lora_A` belongs to the parameter that
was wrapped first. The name of the parameter is not in the file; which of the targets it is follows from the shapes.
For E experts lora_A is [E r, in] (expert by expert) and lora_B [out, r E] (the expert counts fastest), and
the update of expert e is B[:, :, e] @ A[e]. A parameter [E, out, in] gets it as it is, one that is stored [E, in, out]
transposed. Source: huggingface/peft, ParamWrapper of src/peft/tuners/lora/layer.py.

transformers 5 stacks what files hold one by one (`experts.3.w1.weight`): the rows of gate lie above those of up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from llmkit.errors import RequirementError, SpecError, listing
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_config import MERGE_WITH_PEFT, scaling_of
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.moving import Concat, TakeRows
from llmkit.tensors.spec import TensorSpec
from llmkit.transforms.lora.names import OTHER_BASE

_WRAPPER = ".base_layer"
# Leaves of the matrices that a stacked parameter holds, in the order of their rows.
_STACKED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_EXPERT = re.compile(r"^(?P<before>.+)\.(?P<expert>\d+)\.(?P<leaf>\w+)\.weight$")


@dataclass(frozen=True)
class Update:
    """What is added to one tensor of the base: scale * left @ right, for a stack one pair for each expert.

    Attributes:
        name: of the tensor.
        left: [rows, r], or [E, rows, r].
        right: [r, columns], or [E, r, columns].
    """

    name: str
    left: Lazy
    right: Lazy
    scale: float


@dataclass(frozen=True)
class _Place:
    """A parameter of the base: one stacked tensor, or the matrices of each expert, row blocks in order."""

    parameter: str
    shape: tuple[int, ...]
    experts: tuple[tuple[str, ...], ...] = ()
    name: str = ""


def targets_of(config: Mapping[str, object], module: str) -> list[str]:
    """The parameters of a module that `target_parameters` may mean."""
    stated = config.get("target_parameters")
    targets: dict[str, None] = {}
    for target in stated if isinstance(stated, list) else ():
        owner, _, leaf = str(target).rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            targets.setdefault(leaf)
    return list(targets)


def parameter_updates(adapter: Adapter, tensors: Mapping[str, Lazy], module: str, at: str) -> list[Update]:
    """The updates of the parameters of a module, from all of its wrappers.

    Args:
        module: path of the module in the trained model, without wrappers.
        at: the same in the base.

    Raises:
        RequirementError: shapes do not tell which parameter an update is for.
        SpecError: no target of the adapter has a place in the base.
    """
    levels = [parts for path, parts in _levels(adapter, module)]
    targets = targets_of(adapter.config, module)
    places = [place for leaf in targets if (place := _find(tensors, at, leaf)) is not None]
    fitting = [
        chosen
        for chosen in permutations(places, len(levels))
        if all(_fits(place, parts) for place, parts in zip(chosen, levels, strict=True))
    ]
    if not fitting:
        have = f"has {listing(f'{p.parameter} {list(p.shape)}' for p in places)}" if places else "has none of them"
        shapes = [f"[{parts['lora_B'].shape[0]}, {parts['lora_A'].shape[1]}]" for parts in levels]
        raise SpecError(
            f"{adapter.label}: updates of {module} ({listing(targets)}) are {listing(shapes)}; the base {have}",
            hint=OTHER_BASE,
        )
    if len(fitting) > 1:
        raise RequirementError(
            f"{adapter.label}: {listing(targets)} of {module} have the same shapes, and the file does not tell which "
            "update is for which",
            hint=MERGE_WITH_PEFT,
        )
    is_swapped = _is_swapped(adapter, tensors, at, list(zip(fitting[0], levels, strict=True)))
    updates: list[Update] = []
    for place, parts in zip(fitting[0], levels, strict=True):
        updates += _updates(adapter, module, place, parts, is_swapped)
    return updates


def unwrapped(module: str) -> str:
    """A module path without the components that wrappers of parameters add."""
    while module.endswith(_WRAPPER):
        module = module.removesuffix(_WRAPPER)
    return module


def _levels(adapter: Adapter, module: str) -> Iterator[tuple[str, Mapping[str, Lazy]]]:
    path = module
    while path in adapter.modules:
        yield path, adapter.modules[path]
        path += _WRAPPER


def _find(tensors: Mapping[str, Lazy], module: str, leaf: str) -> _Place | None:
    name = f"{module}.{leaf}"
    if name in tensors:
        return _Place(leaf, tensors[name].shape, name=name)
    numbers = _numbers(module)
    if leaf not in _STACKED:  # another name of the module in the file: the same layer and the same last component
        end = f".{module.rpartition('.')[2]}.{leaf}"
        alike = [stored for stored in tensors if stored.endswith(end) and _numbers(stored) == numbers]
        return _Place(leaf, tensors[alike[0]].shape, name=alike[0]) if len(alike) == 1 else None
    located: dict[str, dict[int, str]] = {}
    for stored in tensors:
        match = _EXPERT.match(stored)
        if match is not None and _numbers(match["before"]) == numbers:
            located.setdefault(match["leaf"], {})[int(match["expert"])] = stored
    for leaves in _STACKED[leaf]:
        if not all(part in located for part in leaves):
            continue
        n = len(located[leaves[0]])
        if any(set(located[part]) != set(range(n)) for part in leaves):
            continue
        experts = tuple(tuple(located[part][e] for part in leaves) for e in range(n))
        shapes = [tensors[stored].shape for stored in experts[0]]
        return _Place(leaf, (n, sum(s[0] for s in shapes), shapes[0][1]), experts)
    return None


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]


def _fits(place: _Place, parts: Mapping[str, Lazy]) -> bool:
    a, b = parts["lora_A"].shape, parts["lora_B"].shape
    if len(place.shape) == 2:
        return place.shape == (b[0], a[1])
    if len(place.shape) != 3 or a[0] % place.shape[0]:
        return False
    return place.shape[1:] == (b[0], a[1]) or (not place.experts and place.shape[1:] == (a[1], b[0]))


def _is_swapped(
    adapter: Adapter, tensors: Mapping[str, Lazy], module: str, chosen: Sequence[tuple[_Place, Mapping[str, Lazy]]]
) -> bool:
    """Whether stacks are stored [E, in, out], decided by any parameter of the module that is not square.

    Raises:
        RequirementError: all are square.
    """
    stacks = [(place, parts) for place, parts in chosen if len(place.shape) == 3 and not place.experts]
    for place, parts in stacks:
        if place.shape[1] != place.shape[2]:
            return place.shape[1] == parts["lora_A"].shape[1]
    if not stacks:
        return False
    # A square one beside another of its module: the inputs of one are the outputs of the other, so their order shows.
    width = stacks[0][0].shape[1]
    for leaf in _STACKED:
        other = tensors.get(f"{module}.{leaf}")
        if other is not None and len(other.shape) == 3 and other.shape[1] != other.shape[2]:
            return other.shape[1] == width if leaf == "gate_up_proj" else other.shape[2] == width
    raise RequirementError(
        f"{adapter.label}: {module}.{stacks[0][0].parameter} is square, and nothing tells whether its rows are inputs "
        "or outputs",
        hint=MERGE_WITH_PEFT,
    )


def _updates(
    adapter: Adapter, module: str, place: _Place, parts: Mapping[str, Lazy], is_swapped: bool
) -> Iterator[Update]:
    n = place.shape[0] if len(place.shape) == 3 else 1
    a, b = parts["lora_A"], parts["lora_B"]
    rank = a.shape[0] // n
    scale = scaling_of(adapter.config, adapter.kind, f"{module}.{place.parameter}", rank)
    if len(place.shape) == 2:
        yield Update(place.name, b, a, scale)
    elif place.experts:
        for e, names in enumerate(place.experts):
            right, left = TakeRows(a, e * rank, (e + 1) * rank).output(), _of_expert(b, rank, n, e)
            n_rows = b.shape[0] // len(names)
            for i, name in enumerate(names):
                yield Update(name, TakeRows(left, i * n_rows, (i + 1) * n_rows).output(), right, scale)
    else:
        left, right = _stacked(b, (n, b.shape[0], rank), is_swapped), _stacked(a, (n, rank, a.shape[1]), is_swapped)
        yield Update(place.name, *((right, left) if is_swapped else (left, right)), scale)


def _of_expert(b: Lazy, rank: int, n_experts: int, expert: int) -> Lazy:
    """The columns of one expert."""
    spec = TensorSpec(b.dtype, (b.shape[0], rank))
    return Apply(
        "expert", [b], spec, lambda x: x.view(-1, rank, n_experts)[:, :, expert].contiguous(), {"expert": expert}
    ).output()


def _stacked(lazy: Lazy, shape: tuple[int, int, int], is_swapped: bool) -> Lazy:
    """A or B as one matrix for each expert, transposed where the parameter is."""
    is_b = lazy.shape[0] == shape[1] and lazy.shape[1] == shape[0] * shape[2]
    spec = TensorSpec(lazy.dtype, (shape[0], shape[2], shape[1]) if is_swapped else shape)

    def fn(x: torch.Tensor) -> torch.Tensor:
        stacked = x.view(shape[1], shape[2], shape[0]).permute(2, 0, 1) if is_b else x.view(shape)
        return (stacked.transpose(1, 2) if is_swapped else stacked).contiguous()

    return Concat([Apply("by expert", [lazy], spec, fn, row_step=None).output()]).output()
