"""The same model as another architecture: where two families compute the same thing from differently stored weights.

A plugin says which config of another family means the same model (`Architecture.equivalents`). Whether it does is
checked here, kind by kind: what differs in more than storage is refused. A head whose rows are normalised at run time
is folded into plain rows; rotary pairs are reordered where the other family pairs dims otherwise.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from llmkit.architecture import registry
from llmkit.architecture.keys import as_bool
from llmkit.architecture.kind import Kind
from llmkit.architecture.model import Model
from llmkit.architecture.positions import Rope
from llmkit.architecture.storage import rotary_pairs, tensors_of, weights_of
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import RequirementError, SpecError
from llmkit.quantization import reading
from llmkit.tensors.lazy import Apply, Lazy

if TYPE_CHECKING:
    import torch

__all__ = ["as_architecture"]


def as_architecture(ckpt: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint stored and described as the architecture `name`.

    Raises:
        RequirementError: no plugin describes the checkpoint, or its family has no equivalent of that name.
        SpecError: this checkpoint has something that the other architecture cannot express.
    """
    source = registry.require(dict(ckpt.config), ckpt.label)
    if name == source.name:
        return ckpt
    if name not in source.equivalents:
        known = ", ".join(source.equivalents)
        raise RequirementError(
            f"{ckpt.label} is of the {source.name} architecture, which cannot be stored as {name!r}",
            hint=f"it can as {known}" if known else "leave --as out: no other architecture computes the same",
        )
    ckpt = reading.dequantized(ckpt)
    config = source.equivalents[name](dict(ckpt.config))
    model = source.bind(dict(ckpt.config))
    target = registry.require(config, ckpt.label).bind(config)
    weights = weights_of(ckpt.tensors, model)
    notes = []
    if as_bool(model.head.normalized) and not as_bool(target.head.normalized):
        weights["head.weight"] = _normalized(weights["head.weight"])
        notes.append("the rows of the head are divided by their norms, as the original does at run time")
    pairs = _pairs(target)
    if _pairs(model) != pairs:
        weights = rotary_pairs(weights, model, to=pairs)
    _same(ckpt.label, name, model, target)
    if target.is_tied:
        weights.pop("head.weight", None)
    return ckpt.derive(tensors=tensors_of(weights, target), config=config, notes=notes)


def _pairs(model: Model) -> Any:
    position = getattr(model.block, "position", None)
    return position.pairs if isinstance(position, Rope) else None


def _same(label: str, name: str, model: Model, target: Model) -> None:
    """Refuse what is not the same computation: sizes, kinds or their numbers."""
    sizes = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab")
    ours: dict[str, Any] = {size: getattr(model.dims, size) for size in sizes}
    theirs: dict[str, Any] = {size: getattr(target.dims, size) for size in sizes}
    for i, (a, b) in enumerate(zip(model.blocks, target.blocks, strict=False)):
        ours |= _flat(f"layer {i}", a)
        theirs |= _flat(f"layer {i}", b)
    ours |= _flat("embedding", model.embedding) | _flat("final norm", model.final_norm)
    theirs |= _flat("embedding", target.embedding) | _flat("final norm", target.final_norm)
    ours |= _flat("head", replace(model.head, normalized=False))
    theirs |= _flat("head", target.head)
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            raise SpecError(
                f"{label}: {key} is {ours.get(key)!r}, where {name} has {theirs.get(key)!r}: not the same model",
                hint="leave --as out",
            )


def _flat(stem: str, kind: Any) -> dict[str, Any]:
    """The numbers of a kind and of those inside it; how rotary pairs lie is storage, not computation."""
    found: dict[str, Any] = {stem: type(kind).__name__}
    for field in fields(kind):
        value = getattr(kind, field.name)
        if isinstance(value, Kind):
            found |= _flat(f"{stem} {field.name}", value)
        elif field.name != "pairs":
            found[f"{stem} {field.name}"] = value
    return found


def _normalized(weight: Lazy) -> Lazy:
    def fn(x: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)

    return Apply("row / norm", [weight], weight.spec, fn, scratch=2.0).output()
