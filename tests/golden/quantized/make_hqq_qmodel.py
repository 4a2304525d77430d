"""Writes hqq_qmodel.pt, as `save_quantized` of HQQ's own models does, and what its layers restore (.safetensors).

Run in an environment with hqq 0.2.8 and torch: python tests/golden/quantized/make_hqq_qmodel.py
"""

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.base import BaseHQQModel, BasePatch
from safetensors.torch import save_file

HERE = Path(__file__).parent


class Model(torch.nn.Module):
    """Two quantized layers, a norm, and a head in floats."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, bits, size, dtype in (("up", 4, 32, torch.float16), ("down", 3, 16, torch.float32)):
            config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=1)
            layer = HQQLinear(torch.nn.Linear(64, 8), config, compute_dtype=dtype, device="cpu")
            setattr(self, name, layer)
        self.norm, self.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4, bias=False)


class Saved(BasePatch, BaseHQQModel):
    """What its models of each family inherit."""


def main() -> None:
    model = Model()
    torch.save(Saved.serialize_weights(model, verbose=True), HERE / "hqq_qmodel.pt")
    expected = {f"{name}.weight": getattr(model, name).dequantize() for name in ("up", "down")}
    expected |= {"norm.weight": model.norm.weight, "head.weight": model.head.weight, "up.bias": model.up.bias}
    save_file({k: v.detach().contiguous() for k, v in expected.items()}, HERE / "hqq_qmodel.safetensors")


if __name__ == "__main__":
    main()
