"""From a checkpoint to a decoder: tensors are loaded and cast one by one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.hooks import Weights
from llmkit.architecture.model import Model
from llmkit.architecture.registry import require
from llmkit.architecture.storage import part_of
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import require_model
from llmkit.checkpoint.text_part import float_text_part, text_part
from llmkit.decoder.language_model import LanguageModel
from llmkit.decoder.linear import Linear
from llmkit.decoder.model import Decoder
from llmkit.errors import InputError, RequirementError, require_choice
from llmkit.lazy_imports import torch
from llmkit.tensors.device import CPU, default_device, torch_device
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType

BACKENDS = ("auto", "llmkit", "transformers")


def load_backend(
    ckpt: Checkpoint, *, backend: str = "auto", dtype: str = "float32", device: str = "cpu"
) -> LanguageModel:
    """A model to score and generate with.

    Args:
        ckpt: the checkpoint.
        backend: `llmkit` is llmkit's own decoder, `transformers` the class of the installed transformers; `auto` is
            llmkit's where a plugin describes the model, and asks for a choice where none does.
        dtype, device: as for `load_decoder`.

    Raises:
        InputError: no such backend.
        RequirementError: the backend does not know the architecture.
    """
    require_choice("--backend", backend, BACKENDS)
    if backend == "transformers":
        from llmkit.decoder.foreign import load_transformers

        return load_transformers(ckpt, _compute_dtype(dtype).torch, torch_device(device))
    ckpt = text_part(require_model(ckpt, "the decoder"))
    try:
        architecture = require(ckpt.config, ckpt.label)
    except RequirementError as error:
        hint = "--backend transformers computes it with the installed transformers' class"
        raise RequirementError(error.message, hint=hint if backend == "auto" else error.hint) from error
    return load_decoder(ckpt, dtype=dtype, device=device, architecture=architecture)


def load_decoder(
    ckpt: Checkpoint,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    architecture: Architecture | None = None,
    streamed: bool = False,
) -> Decoder:
    """The torch decoder of a checkpoint, float or quantized; warns of keys of the config that no kind reads.

    Args:
        ckpt: the checkpoint; a quantized one is computed with its dequantized weights.
        dtype: the compute dtype: float32, bfloat16 or float16.
        device: a torch device, `cpu` or `cuda`.
        architecture: the one to use, where it shall not be the one that the registry finds.
        streamed: one layer in memory at a time, read anew in each pass.

    Raises:
        RequirementError: no plugin describes it, a kind has no torch reader, a key of the config that no kind reads
            is known to change the numbers, or the device is not there.
        SpecError: the tensors do not fit the config.
    """
    return _loaded(ckpt, dtype, device, architecture, streamed)[0]


def load_blocks(ckpt: Checkpoint, *, device: str = "cpu") -> tuple[Decoder, Weights]:
    """A decoder whose layers are made one by one (`Decoder.layer`), and the weights to make them of.

    Raises:
        RequirementError, SpecError: as of `load_decoder`.
    """
    return _loaded(ckpt, "float32", device, None, True)


def _loaded(
    ckpt: Checkpoint, dtype: str, device: str, architecture: Architecture | None, streamed: bool
) -> tuple[Decoder, Weights]:
    wanted = _compute_dtype(dtype)
    where = torch_device(device)
    require_model(ckpt, "the decoder")
    architecture = architecture or require(text_part(ckpt).config, ckpt.label)
    ckpt = float_text_part(ckpt, dtype=wanted)
    model = architecture.bind(ckpt.config).fitted(ckpt.tensors)
    model.unread.raise_if_refused(ckpt.label)
    model.check(ckpt.specs).raise_if_bad(ckpt.label)
    for text in model.unread.warnings:  # commands say it themselves (`model_warnings`)
        warnings.warn(text, stacklevel=3)
    with torch.inference_mode():
        weights = _Stored(model, ckpt.tensors, wanted, where)
        return Decoder(model, weights, wanted.torch, where, streamed=streamed), weights


class _Stored:
    """Weights by slot, loaded when asked for."""

    def __init__(
        self, model: Model, tensors: Mapping[str, Lazy], dtype: DType, device: torch.device, stem: str = ""
    ) -> None:
        self._model, self._tensors, self._dtype, self._device, self._stem = model, tensors, dtype, device, stem

    def __call__(self, leaf: str) -> torch.Tensor:
        weight = self._stem + leaf
        slot = self._model.slots[self._model.stored_in[weight]]
        lazy = part_of(self._tensors[slot.name], slot, weight).cast(self._dtype)
        with default_device(CPU):  # where files are read
            return lazy.load().to(self._device)

    def has(self, leaf: str) -> bool:
        return self._stem + leaf in self._model.stored_in

    def under(self, stem: str) -> _Stored:
        return _Stored(self._model, self._tensors, self._dtype, self._device, f"{self._stem}{stem}.")

    def observed_linear(self, layer: Linear, names: Sequence[str]) -> Linear:
        return layer


def _compute_dtype(name: str) -> DType:
    wanted = DType.parse(name)
    if wanted not in (DType.F32, DType.BF16, DType.F16):
        raise InputError(f"cannot compute in {wanted.torch_name}", hint="use float32, bfloat16 or float16")
    return wanted
