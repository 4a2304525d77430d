"""Writes auto_round.safetensors: layers as AutoRound packs them, and the first and last row that it restores.

Run in an environment with auto-round 0.16 and torch: python tests/golden/quantized/make_auto_round.py
"""

from pathlib import Path

import torch
from auto_round_extension.torch.qlinear_torch import QuantLinear as Plain
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as MinusOne
from safetensors.torch import save_file

# Name, class, bits, symmetric.
CASES = [
    ("plain2", Plain, 2, False),
    ("plain3", Plain, 3, False),
    ("plain4", Plain, 4, False),
    ("minus3", MinusOne, 3, True),
    ("minus4", MinusOne, 4, True),
]


def main() -> None:
    tensors = {}
    torch.manual_seed(0)
    for name, kind, bits, symmetric in CASES:
        linear, top = torch.nn.Linear(64, 32, bias=False), 2**bits - 1
        weight = linear.weight.data
        if name == "plain4":
            weight[:2] = weight[:2].abs() + 0.01  # zero points of 0
        groups = weight.reshape(32, 2, 32)
        if symmetric:
            scales, zeros = 2 * groups.abs().amax(-1) / top, 2 ** (bits - 1)
        else:
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scales = (high - low) / top
            zeros = (-low / scales).round().clamp(0, top)
        layer = kind(bits, 32, 64, 32, bias=False)
        layer.device = "cpu"
        layer.pack(linear, scales, zeros, None, device="cpu")
        layer.post_init()
        tensors |= {f"{name}.{end}": getattr(layer, end).clone() for end in ("qweight", "qzeros", "scales")}
        with torch.no_grad():
            tensors[f"expected.{name}"] = layer(torch.eye(64)).t()[[0, -1]].contiguous()
    save_file(tensors, Path(__file__).with_name("auto_round.safetensors"))


if __name__ == "__main__":
    main()
