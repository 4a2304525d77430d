"""Writes bitsandbytes.safetensors: layers that bitsandbytes quantized, and the first and last row that it restores.

Run in an environment with bitsandbytes 0.50.2 and torch: python tests/golden/quantized/make_bitsandbytes.py
"""

from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import save_file

NESTED, PLAIN = True, False
CASES = [
    ("nf4", (6, 128), torch.bfloat16, PLAIN, 64),
    ("nf4", (17, 512), torch.float16, NESTED, 32),  # more than 256 blocks: two nested ones
    ("fp4", (6, 128), torch.float32, PLAIN, 128),
    ("fp4", (5, 128), torch.bfloat16, NESTED, 64),
    ("nf4", (7, 30), torch.float32, NESTED, 64),  # blocks cross the rows, and the last is not full
]


def main() -> None:
    tensors = {}
    for i, (kind, shape, dtype, nested, size) in enumerate(CASES):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) * 0.05
        made, state = functional.quantize_4bit(weight, blocksize=size, quant_type=kind, compress_statistics=nested)
        tensors[f"case{i}.weight"] = made
        tensors |= {f"case{i}.weight.{key}": part for key, part in state.as_dict(packed=True).items()}
        tensors[f"expected.{i}"] = functional.dequantize_4bit(made, state)[[0, -1]]
    weight = torch.randn((6, 40), generator=torch.Generator().manual_seed(9)).half()
    values, largest, _ = functional.int8_vectorwise_quant(weight)
    tensors |= {"rows.weight": values, "rows.SCB": largest, "rows.weight_format": torch.tensor(0, dtype=torch.uint8)}
    tensors["expected.rows"] = functional.int8_vectorwise_dequant(values, largest)[[0, -1]]
    save_file(tensors, Path(__file__).with_name("bitsandbytes.safetensors"))


if __name__ == "__main__":
    main()
