"""Keys and values in int8: where the scales of a graph's cache come from, and a torch cache that rounds as it does.

GroupQueryAttention keeps clip(round(x / scale), -128, 127), with a scale for each head and channel or one for a layer,
and attends to what the codes stand for, those of the same call included (tests/onnx/test_int8_cache_kernel.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.architecture.model import Model
from llmkit.calibration.key_values import MOST_TOKENS, KeyValueScales
from llmkit.calibration.texts import CalibrationText, own_text, read_text
from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.checkpoint.quantized import kv_cache_scheme
from llmkit.checkpoint.tokenizer import has_tokenizer
from llmkit.decoder.kv import KVCache, Pair
from llmkit.errors import InputError, RequirementError, SpecError, require_choice
from llmkit.lazy_imports import torch
from llmkit.tensors.finite import require_finite
from llmkit.tensors.lazy import Apply, Lazy
from llmkit.tensors.spec import DType

DTYPES = ("int8",)
_STORED = re.compile(r"\.(\d+)\.(?:.+\.)?([kv])_scale$")
_PART = {"k": "keys", "v": "values"}


@dataclass(frozen=True)
class CacheScales:
    """The scales of an int8 cache.

    Attributes:
        keys, values: by layer; [kv_heads, 1, head_dim], or one number for a layer.
    """

    keys: tuple[Lazy, ...]
    values: tuple[Lazy, ...]

    @property
    def kind(self) -> str:
        """How GroupQueryAttention calls their shape."""
        return "PER_CHANNEL" if self.keys[0].spec.numel > 1 else "PER_TENSOR"


def choose_scales(
    ckpt: Checkpoint, floats: Checkpoint, model: Model, *, dtype: str, calibration: Path | None, provider: str
) -> tuple[CacheScales, list[str]]:
    """The scales, and what to tell of them: of a file to calibrate on, of the checkpoint, or of llmkit's own text.

    Args:
        ckpt: as it was opened: with the tokenizer, and with scales where it was published with them.
        floats: what the graph computes with.
        dtype: of the cache: int8.
        calibration: a text; None for what there is.
        provider: what the graph is for.

    Raises:
        InputError: an unknown dtype, or nothing to calibrate with.
        RequirementError: the provider cannot compute it.
        SpecError: the scales of the checkpoint do not fit the model.
    """
    require_choice("--kv-cache-dtype", dtype, DTYPES, "leave it out for a cache in the compute dtype")
    if provider != "cpu":
        raise RequirementError(
            f"an int8 cache is made for --provider cpu, found {provider}: GroupQueryAttention there takes no mask "
            "beside one, and what it computes without was never compared",
            hint="export for --provider cpu, or leave --kv-cache-dtype out",
        )
    text = read_text(calibration) if calibration is not None else None
    if text is None:
        stated = _stored(ckpt, model)
        if stated is not None:
            note = "keys and values in int8: the scales are the checkpoint's own (kv_cache_scheme), one for a layer"
            return stated, [note]
    return _calibrated(ckpt, floats, model, text or own_text())


def _calibrated(
    ckpt: Checkpoint, floats: Checkpoint, model: Model, text: CalibrationText
) -> tuple[CacheScales, list[str]]:
    if not has_tokenizer(ckpt):
        raise InputError(
            f"{ckpt.label} has no tokenizer, and the scales of an int8 cache are calibrated on a text",
            hint="copy tokenizer.json (or tokenizer.model) and tokenizer_config.json into the model's folder",
        )
    scales = KeyValueScales(floats, model, ckpt, text).outputs()
    note = (
        f"keys and values in int8, a scale for each channel: calibrated on {text.label} (at most {MOST_TOKENS} "
        "tokens), which runs the whole model once in torch, a layer in memory at a time"
    )
    return CacheScales(scales[::2], scales[1::2]), [note, "an int8 cache makes decoding faster and prompts slower"]


def _stored(ckpt: Checkpoint, model: Model) -> CacheScales | None:
    """The scales that a compressed-tensors checkpoint has for an int8 cache; None where it has none.

    Scales for another grid (FP8) are of no use here: calibrating gives better ones.
    """
    scheme = kv_cache_scheme(ckpt.config)
    if scheme is None or scheme.get("type", "int") != "int" or scheme.get("num_bits") != 8 or scheme.get("dynamic"):
        return None
    if not scheme.get("symmetric", True):
        return None
    scales: dict[tuple[str, int], Lazy] = {}
    for name, lazy in ckpt.tensors.items():
        if at := _STORED.search(name):
            if lazy.spec.numel != 1:
                return None  # a scale for each head: no form that GroupQueryAttention has
            scales[_PART[at[2]], int(at[1])] = lazy
    layers = range(model.dims.layers)
    missing = [(part, i) for part in _PART.values() for i in layers if (part, i) not in scales]
    if missing:
        raise SpecError(
            f"{ckpt.label}: its kv_cache_scheme is int8, but layer {missing[0][1]} has no scale for {missing[0][0]}",
            hint="--calibration FILE computes scales",
        )
    keys, values = (tuple(_checked(scales[part, i].cast(DType.F32)) for i in layers) for part in _PART.values())
    return CacheScales(keys, values)


def _checked(scale: Lazy) -> Lazy:
    def fn(x: torch.Tensor) -> torch.Tensor:
        require_finite(x, x, name="kv_cache_scheme", what="stored scales")
        return x

    return Apply("check scale", [scale], scale.spec, fn).output()


def scales_in(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Float32 scales of keys and values by layer, [kv_heads, 1, head_dim] or one; none for floats."""
    tensors = open_checkpoint(folder).tensors
    scales: list[tuple[torch.Tensor, torch.Tensor]] = []
    while (name := f"layers.{len(scales)}.attn.k_scale") in tensors:
        scales.append((tensors[name].load(), tensors[name.replace("k_scale", "v_scale")].load()))
    return scales


class RoundedDecoder:
    """A torch decoder whose keys and values go through the codes of an int8 cache.

    Args:
        decoder: the one that computes.
        scales: of keys and of values, by layer.
    """

    def __init__(self, decoder: Any, scales: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.model, self._decoder, self._scales = decoder.model, decoder, scales

    def new_cache(self, capacity: int = 0) -> KVCache:
        """An empty cache that rounds."""
        return _RoundedCache(self._scales, capacity)

    def __call__(self, ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, as of the decoder."""
        used = cache if cache is not None else _RoundedCache(self._scales, keep=False)
        logits: torch.Tensor = self._decoder(ids, used, mask)
        return logits


class _RoundedCache(KVCache):
    def __init__(
        self, scales: list[tuple[torch.Tensor, torch.Tensor]], capacity: int = 0, *, keep: bool = True
    ) -> None:
        super().__init__(capacity, keep=keep)
        self._scales = scales

    def as_cached(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        keys, values = self._scales[layer]
        return _rounded(k, keys), _rounded(v, values)


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """X [B, K, S, H] as its codes have it; the kernel multiplies by the inverse of the scale."""
    codes = (x.float() * (1 / scale)).round().clamp(-128, 127)
    return (codes * scale).to(x.dtype)
