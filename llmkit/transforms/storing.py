"""Quantized matrices into a checkpoint: a codec's tensors in the place of the weights, and what config.json says."""

from __future__ import annotations

from collections.abc import Mapping

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.content import FileContent
from llmkit.errors import SpecError
from llmkit.quantization.codec import CONFIG_KEYS, FolderCodec
from llmkit.quantization.matrix import QuantizedMatrix
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.siblings import siblings
from llmkit.transforms.layers import Layers
from llmkit.transforms.serving import serving_notes


def encoded_checkpoint(
    ckpt: Checkpoint, codec: FolderCodec, matrices: Mapping[str, QuantizedMatrix], layers: Layers
) -> Checkpoint:
    """A float checkpoint with some of its weights in a codec's tensors.

    Args:
        matrices: by the names of the weights, which end in `.weight`.
        layers: the same weights, and the linear modules that stay in floats.

    Raises:
        SpecError: a matrix that the layout cannot hold.
    """
    tensors: dict[str, Lazy] = {}
    for name, lazy in ckpt.tensors.items():
        if name not in matrices:
            tensors[name] = lazy
            continue
        matrix = codec.prepared(matrices[name])
        why = codec.refuses(matrix)
        if why is not None:
            raise SpecError(f"{name} does not fit in --format {codec.name}: {why}")
        stem = name.removesuffix("weight")
        tensors |= siblings({stem + end: part for end, part in codec.write(matrix).items()})
    by_module = {name.removesuffix(".weight"): matrix for name, matrix in matrices.items()}
    entry = codec.describe(by_module, layers.ignored, are_all=layers.are_all)
    config = {key: value for key, value in ckpt.config.items() if key not in CONFIG_KEYS}
    files = {name: FileContent.of_json(value) for name, value in codec.files(entry).items()}
    return ckpt.derive(
        tensors=tensors,
        config={**config, CONFIG_KEYS[0]: entry},
        files={**ckpt.files, **files},
        notes=[*codec.notes(by_module), *(serving_notes(ckpt.model, matrices) if ckpt.model is not None else ())],
    )
