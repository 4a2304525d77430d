"""Writes hqq_layout.safetensors: layers as HQQ's `state_dict` has them, and the first and last row that it restores.

Run in an environment with hqq 0.2.8 and torch: python tests/golden/quantized/make_hqq_layout.py
"""

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file

# Bits, axis, group size, [out, in], dtype, view_as_float.
CASES = [
    (8, 1, 32, (4, 64), torch.float16, False),
    (4, 1, 32, (6, 64), torch.bfloat16, False),
    (3, 1, 16, (6, 64), torch.float32, False),
    (2, 1, 64, (8, 64), torch.float16, False),
    (1, 1, 32, (8, 64), torch.float32, False),
    (4, 0, 16, (16, 24), torch.float16, False),
    (3, 0, 32, (16, 24), torch.float32, False),
    (4, 1, 16, (8, 24), torch.float32, False),  # groups cross the rows
    (4, 1, 32, (8, 64), torch.float16, True),
]


def main() -> None:
    tensors = {}
    for i, (bits, axis, size, (n_out, n_in), dtype, as_float) in enumerate(CASES):
        torch.manual_seed(i)
        config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis, view_as_float=as_float)
        layer = HQQLinear(torch.nn.Linear(n_in, n_out, bias=i == 0), config, compute_dtype=dtype, device="cpu")
        tensors |= {f"case{i}.{key}": part.contiguous() for key, part in layer.state_dict().items()}
        tensors[f"expected.{i}"] = layer.dequantize()[[0, -1]]
    save_file(
        {key: part.detach().clone() for key, part in tensors.items()},
        Path(__file__).with_name("hqq_layout.safetensors"),
    )


if __name__ == "__main__":
    main()
