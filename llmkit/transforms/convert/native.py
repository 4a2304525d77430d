"""The same model as another architecture: where two families compute the same thing from differently stored weights.

A plugin says which config of another family means the same model (`Architecture.equivalents`). Whether it does is
checked here, kind by kind: what differs in more than storage is refused. A head whose rows are normalised at run time
is folded into plain rows; rotary pairs are reordered where the other family pairs dims otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.architecture import registry
from llmkit.architecture.difference import difference
from llmkit.architecture.keys import as_bool
from llmkit.architecture.model import Model
from llmkit.architecture.positions import Rope
from llmkit.architecture.storage import normalized_rows, rotary_pairs, tensors_of, weights_of
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized import dequantized
from llmkit.errors import RequirementError, SpecError
from llmkit.tokenization.without_code import tokenizer_without_code


def as_architecture(ckpt: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint stored and described as the architecture `name`.

    Raises:
        RequirementError: no plugin describes the checkpoint, or its family has no equivalent of that name.
        SpecError: this checkpoint has something that the other architecture cannot express.
    """
    source = registry.require(ckpt.config, ckpt.label)
    if name == source.name:
        return ckpt
    if name not in source.equivalents:
        names = ", ".join(source.equivalents)
        raise RequirementError(
            f"{ckpt.label} is of the {source.name} architecture, which cannot be stored as {name!r}",
            hint=f"it can as {names}" if names else "leave --as out: no other architecture computes the same",
        )
    ckpt = dequantized(ckpt)
    config = source.equivalents[name](dict(ckpt.config))
    model = ckpt.require_model()
    model.unread.raise_if_refused(ckpt.label)
    target = registry.require_model(config, ckpt.label)
    plain = replace(model, head=replace(model.head, normalized=target.head.normalized))
    if (differs := difference(plain, target)) is not None:
        raise SpecError(f"{ckpt.label} cannot be stored as {name}: {differs}", hint="leave --as out")
    weights = weights_of(ckpt.tensors, model)
    notes = []
    if as_bool(model.head.normalized) and not as_bool(target.head.normalized):
        if "head.weight" not in weights:
            why = "the rows of its head, which is the embedding, are divided by their norms"
            raise SpecError(f"{ckpt.label} cannot be stored as {name}: {why}", hint="leave --as out")
        weights["head.weight"] = normalized_rows(weights["head.weight"])
        notes.append("the rows of the head are divided by their norms, as the original does at run time")
    pairs = _pairs(target)
    if _pairs(model) != pairs:
        weights = rotary_pairs(weights, model, to=pairs)
    if target.is_tied:
        weights.pop("head.weight", None)
    files, more = tokenizer_without_code(ckpt)
    return ckpt.derive(
        tensors=tensors_of(weights, target),
        config=config,
        files=files,
        notes=[*notes, *more],
        warnings=model.unread.warnings,
    )


def _pairs(model: Model) -> Any:
    position = getattr(model.block, "position", None)
    return position.pairs if isinstance(position, Rope) else None
