"""Quantized matrices into a checkpoint: a codec's tensors in the place of the weights, and what config.json says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import SpecError, listing
from llmkit.quantization.codec import CONFIG_KEYS, FolderCodec
from llmkit.quantization.matrix import QuantizedMatrix
from llmkit.tensors.alike import Alike
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.siblings import siblings
from llmkit.transforms.layers import Layers, globs_of
from llmkit.transforms.serving import serving_notes


def encoded_checkpoint(
    ckpt: Checkpoint,
    codec: FolderCodec,
    matrices: Mapping[str, QuantizedMatrix],
    layers: Layers,
    made_of: tuple[Mapping[str, Lazy], Callable[[Lazy, str], QuantizedMatrix]] | None = None,
) -> Checkpoint:
    """A float checkpoint with some of its weights in a codec's tensors.

    Args:
        matrices: by the names of the weights, which end in `.weight`.
        layers: the same weights, and the linear modules that stay in floats.
        made_of: the weights, and what makes a matrix of one and its name: `matrices` then holds one for all that are
            made alike.

    Raises:
        SpecError: a matrix that the layout cannot hold.
    """
    prepared = {id(matrix): codec.prepared(matrix) for matrix in {id(m): m for m in matrices.values()}.values()}
    reasons = {key: why for key, matrix in prepared.items() if (why := codec.refuses(matrix)) is not None}
    refused = {name: reasons[id(matrix)] for name, matrix in matrices.items() if id(matrix) in reasons}
    if refused:
        slots = ckpt.model.tensors() if ckpt.model is not None else {}
        way = f"quantize --keep {' --keep '.join(globs_of(refused))}"
        is_head = all(name in slots and slots[name].kind == "head" for name in refused)
        if is_head:  # --keep would contradict what names it
            way = "no --head-bits, and no recipe or --only that names it"
        raise SpecError(
            f"{listing(list(refused), 2)} {'does' if len(refused) == 1 else 'do'} not fit in --format {codec.name}: "
            + listing(list(dict.fromkeys(refused.values())), 2),
            hint=f"leave {'it' if len(refused) == 1 else 'them'} in floats ({way}), or take another format",
        )
    if made_of is not None:
        weights, make = made_of
        alike = Alike(lambda weight, name: siblings(codec.write(codec.prepared(make(weight, name)))))
    tensors: dict[str, Lazy] = {}
    for name, lazy in ckpt.tensors.items():
        if name not in matrices:
            tensors[name] = lazy
            continue
        stem, key = name.removesuffix("weight"), id(matrices[name])
        is_like = made_of is not None
        parts = alike(key, (weights[name],), name) if is_like else siblings(codec.write(prepared[key]))
        for end, part in parts.items():
            tensors[stem + end] = part
    by_module = {name.removesuffix(".weight"): matrix for name, matrix in matrices.items()}
    experts = {name.removesuffix(".weight") for name in layers.experts}
    entry = codec.describe(by_module, layers.ignored, are_all=layers.are_all, experts=experts)
    config = {key: value for key, value in ckpt.config.items() if key not in CONFIG_KEYS}
    files = {name: FileContent.of_json(value) for name, value in codec.files(entry).items()}
    encoded = ckpt.derive(
        tensors=tensors,
        config={**config, CONFIG_KEYS[0]: entry},
        files={**ckpt.files, **files},
        notes=[
            *codec.notes(by_module, experts),
            *(serving_notes(ckpt.model, matrices) if ckpt.model is not None else ()),
            *_loader_limits(ckpt, tensors),
        ],
    )
    return replace(encoded, float_specs=ckpt.specs)


def _loader_limits(ckpt: Checkpoint, tensors: Iterable[str]) -> list[str]:
    """What the family's plugin says of loaders of such tensors."""
    limits = ckpt.architecture.loader_limits if ckpt.architecture is not None else {}
    ends = {name.rpartition(".")[2] for name in tensors} if limits else ()
    return list(dict.fromkeys(said for end, said in limits.items() if end in ends))
