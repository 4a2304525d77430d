"""Linear layers as others store them quantized: sound tensors of random codes, and what config.json says of them.

Right values are recorded from the libraries (`tests/golden/quantized`); these serve to open whole models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["LAYOUTS", "Published", "text_tensor", "write_published"]

NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
       0.723, 1.0)  # fmt: skip
Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """A layout.

    Attributes:
        parts: of a layer [out, in], by what follows the module's name.
        words: what `inspect` calls it.
        config: keys of config.json.
    """

    parts: Callable[[int, int], Parts]
    words: str
    config: Mapping[str, Any] = field(default_factory=dict)


def _codes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(max(info.min, -127), info.max + 1, shape, dtype=dtype)


def _scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape) * 0.05 + 0.01


def text_tensor(text: str) -> torch.Tensor:
    """A text as uint8."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _nf4(o: int, i: int, *, nested: bool = False) -> Parts:
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [o, i]}
    parts = {"weight": _codes(o * i // 2, 1), "weight.quant_map": torch.tensor(NF4)}
    n = o * i // 64
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02}
        parts |= {"weight.absmax": _codes(n), "weight.nested_absmax": _scales(-(-n // 256)) * 0.1}
        parts["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    else:
        parts["weight.absmax"] = _scales(n)
    return parts | {"weight.quant_state.bitsandbytes__nf4": text_tensor(json.dumps(state))}


def _llm_int8(o: int, i: int) -> Parts:
    form = torch.tensor(0, dtype=torch.uint8)
    return {"weight": _codes(o, i, dtype=torch.int8), "SCB": _scales(o), "weight_format": form}


def _rows(o: int, i: int, bits: int) -> Parts:
    return {"weight": _codes(o, i * bits // 8, dtype=torch.int8), "weight_scale": (_scales(o) / 2**bits).half()}


def _qlinear(o: int, i: int, bits: int) -> Parts:
    stored = _codes(o, i // 8, dtype=torch.int32) if bits == 4 else _codes(i, o, dtype=torch.int8)
    return {"weight": stored, "scale": _scales(o) / 2**bits}


def _float8(o: int, i: int, **scales: torch.Tensor) -> Parts:
    return {"weight": (torch.randn(o, i) * 60).to(torch.float8_e4m3fn), **scales}


def _hqq(o: int, i: int, axis: int) -> Parts:
    n, one = o * i // 32, torch.tensor
    numbers = {"group_size": 32, "axis": axis, "nbits": 4}
    about = {key: one(value, dtype=torch.int32) for key, value in numbers.items()} | {"shape": one([o, i])}
    groups = (n, 1) if axis else (1, n)
    return about | {
        "W_q": _codes(n // 2, 32) if axis else _codes(16, n),
        "scale": _scales(*groups).half() / 8,
        "zero": torch.rand(groups).half() + 7,
        "packing": text_tensor("4bit_u8"),
        "compute_dtype": text_tensor("torch.float16"),
        "view_as_float": one(0, dtype=torch.uint8),
    }


def _entry(method: str, **keys: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **keys}}


LAYOUTS: dict[str, Published] = {
    "nf4": Published(_nf4, "nf4, bitsandbytes", _entry("bitsandbytes", load_in_4bit=True)),
    "nf4_nested": Published(lambda o, i: _nf4(o, i, nested=True), "nf4, bitsandbytes"),
    "hqq": Published(lambda o, i: _hqq(o, i, 1), "hqq", _entry("hqq", quant_config={})),
    "hqq_axis_0": Published(lambda o, i: _hqq(o, i, 0), "hqq"),
    "fp8_blocks": Published(
        lambda o, i: _float8(o, i, weight_scale_inv=_scales(-(-o // 32), -(-i // 32)) / 60),
        "float8, fp8",
        _entry("fp8", activation_scheme="dynamic", weight_block_size=[32, 32]),
    ),
    "fp8_tensor": Published(
        lambda o, i: _float8(o, i, weight_scale_inv=_scales(1)[0] / 60, activation_scale=_scales(1)[0]),
        "float8, fp8",
        _entry("fp8", activation_scheme="static"),
    ),
    "float_quantized": Published(
        lambda o, i: _float8(o, i, weight_scale=_scales(o, 1) / 60),
        "float8 per channel symmetric, compressed-tensors",
        _entry(
            "compressed-tensors",
            format="float-quantized",
            config_groups={
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
                }
            },
        ),
    ),
    "chatglm_int4": Published(
        lambda o, i: _rows(o, i, 4), "int4 per channel symmetric, chatglm", {"quantization_bit": 4}
    ),
    "chatglm_int8": Published(
        lambda o, i: _rows(o, i, 8), "int8 per channel symmetric, chatglm", {"quantization_bit": 8}
    ),
    "baichuan_int4": Published(lambda o, i: _qlinear(o, i, 4), "int4 per channel symmetric, baichuan"),
    "baichuan_int8": Published(lambda o, i: _qlinear(o, i, 8), "int8 per channel symmetric, baichuan"),
    "llm_int8": Published(_llm_int8, "int8, bitsandbytes", _entry("bitsandbytes", load_in_8bit=True)),
}


def write_published(base: Path, out: Path, name: str, *, suffix: str = "_proj.weight") -> Path:
    """The model in `base` with its layers in a layout: their names end with `suffix`."""
    layout, generator = LAYOUTS[name], torch.random.fork_rng([])
    tensors: dict[str, torch.Tensor] = {}
    with generator:
        torch.manual_seed(0)
        for key, weight in load_file(base / "model.safetensors").items():
            if not key.endswith(suffix):
                tensors[key] = weight.half()
                continue
            n_out, n_in = weight.shape
            tensors |= {key.removesuffix("weight") + end: part for end, part in layout.parts(n_out, n_in).items()}
    out.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float16"} | layout.config
    config.pop("dtype", None)
    (out / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out
