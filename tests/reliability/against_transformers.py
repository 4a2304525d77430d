"""One config, two computations: transformers' class of a model written to a folder, and llmkit's decoder of it.

Weights follow from the seed, the tensor's name and its shape, so that two configs of the same sizes have the same ones.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.registry import default_registry, require
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder.foreign import quiet_transformers
from llmkit.decoder.load import load_decoder
from llmkit.errors import LlmkitError
from llmkit.pipeline.pool import torch_threads

__all__ = ["PLUGINS", "Outcome", "Theirs", "described", "quietly", "their_model", "try_ours"]

PLUGINS: dict[str, Architecture] = {
    p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin
}
TOLERANCE = 2e-5  # relative to the largest logit; both sides compute in float32, in another order
N_TOKENS = 24
Layout = list[tuple[str, tuple[int, ...], str]]


@dataclass(frozen=True)
class Theirs:
    """Transformers' model of one config.

    Attributes:
        logits: [2, N_TOKENS, vocab] in float32.
        tensors: what it would save.
        layout: name and shape of each of its own tensors, and the name of the first one with the same bytes.
        rounding: gives how far its logits are from its own that are rounded otherwise, relative to the largest; 0 if
            not asked for.
    """

    logits: torch.Tensor
    tensors: dict[str, torch.Tensor]
    layout: Layout
    rounding: Callable[[], float]


@dataclass(frozen=True)
class Outcome:
    """What llmkit made of it: the difference of logits, a refusal, or what was said beside the logits."""

    difference: float | None = None
    allowed: float = TOLERANCE
    refusal: str | None = None
    said: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        return self.difference is not None and self.difference <= self.allowed


@contextmanager
def quietly() -> Iterator[None]:
    """One thread (models are small), nothing on the terminal."""
    with torch_threads(1), quiet_transformers():
        yield


def described(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config in the words of a class of transformers; None where there is none for the family."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if architecture.reference_config is not None:
        config = dict(architecture.reference_config(config))
    return dict(config) if config.get("model_type") in known else None


def ids_of(vocab: int) -> torch.Tensor:
    """Token ids [2, N_TOKENS]."""
    return torch.randint(3, vocab, (2, N_TOKENS), generator=torch.Generator().manual_seed(1))


def their_model(
    config: Mapping[str, Any],
    attention: str = "eager",
    seed: int = 0,
    *,
    is_exact: bool = False,
    like: Theirs | None = None,
) -> Theirs:
    """Transformers' model with seeded weights in which every part matters; whatever it raises is its own refusal.

    Args:
        is_exact: how it rounds counts.
        like: of the same class and seed; with the same tensors it would save the same files, which are taken from it.
    """
    made = transformers.AutoConfig.for_model(**json.loads(json.dumps(dict(config))))
    name = (config.get("architectures") or [None])[0]
    maker = getattr(transformers, name)._from_config if name else transformers.AutoModelForCausalLM.from_config
    model = maker(made, attn_implementation=attention).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            data = _noise(seed, name, tuple(weight.shape))
            if "norm" in name or "ln_" in name or ".ln" in name:
                weight.copy_(0.3 * data if name.endswith("bias") else 1 + 0.2 * data)
            else:
                weight.copy_(data * (0.3 if name.endswith("bias") else weight.shape[-1] ** -0.5))
    layout = _layout(model)
    stored = _saved(model, like if like is not None and like.layout == layout else None)  # the first pass may change it
    with torch.inference_mode():
        ids = ids_of(int(model.get_input_embeddings().weight.shape[0]))
        logits = model(ids, use_cache=False).logits
    return Theirs(logits, stored, layout, partial(_rounding, model, ids, logits) if is_exact else float)


@lru_cache(maxsize=512)
def _noise(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {shape}".encode()))
    return torch.randn(shape, generator=generator)


def _layout(model: Any) -> Layout:
    first: dict[int, str] = {}
    return [
        (name, tuple(w.shape), first.setdefault(w.data_ptr(), name))
        for name, w in model.state_dict(keep_vars=True).items()
    ]


@torch.inference_mode()
def _rounding(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> float:
    return max(relative(logits, other) for other in _rounded_otherwise(model, ids))


def _rounded_otherwise(model: Any, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits with each weight the float32 above it or below it, and in float64 where the class can."""
    stated = {name: w.clone() for name, w in model.state_dict().items()}
    generator = torch.Generator().manual_seed(7)
    near = {n: torch.nextafter(w, w + torch.randn(w.shape, generator=generator)) for n, w in stated.items()}
    model.load_state_dict(near)
    yield model(ids, use_cache=False).logits
    model.load_state_dict(stated)
    with suppress(RuntimeError):  # a class that mixes its own dtypes in
        yield model.double()(ids, use_cache=False).logits


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit where that is above one."""
    return float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))


def _saved(model: Any, like: Theirs | None) -> dict[str, torch.Tensor]:
    """The tensors as `save_pretrained` names and chooses them; those of a model that has the same ones, if there is."""
    with tempfile.TemporaryDirectory() as folder:
        if like is not None:
            model.config.save_pretrained(folder)  # which refuses configs
            return like.tensors
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def try_ours(theirs: Theirs, config: Mapping[str, Any], folder: Path) -> Outcome:
    """Write the folder as a user would have it, and compute its logits with llmkit."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config)))
    try:
        ckpt = open_checkpoint(folder)
        said = require(ckpt.config, ckpt.label).bind(ckpt.config).unread.warnings
        found = load_decoder(ckpt)(ids_of(theirs.logits.shape[-1])).float()
    except LlmkitError as error:
        return Outcome(refusal=error.message)
    except Exception as error:  # noqa: BLE001 - a crash is the worst of differences
        return Outcome(difference=float("inf"), said=(f"{type(error).__name__}: {error}",))
    if found.shape != theirs.logits.shape:
        return Outcome(difference=float("inf"), said=said)
    difference = relative(found, theirs.logits)
    return Outcome(difference, max(TOLERANCE, 10 * theirs.rounding() if difference > TOLERANCE else 0.0), said=said)
