"""Record layers as GPTQModel and AutoAWQ pack them, and what the libraries restore: gptq.safetensors, awq.safetensors.

In an environment of its own: pip install --no-deps gptqmodel==7.7.0 autoawq==0.2.9 (torch, transformers 5), then
python tests/golden/packed/record.py. Weights are random grid points, so that packing rounds nothing.
"""

import hashlib
import importlib
import sys
import types
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

N_OUT, N_IN = 32, 64
HOME = Path(__file__).parent


def grid(bits, group, generator, low=0, dtype=torch.float16):
    """Codes [out, in], zero points and scales [out, groups]."""
    n_groups = N_IN // group
    codes = torch.randint(0, 1 << bits, (N_OUT, N_IN), generator=generator)
    zeros = torch.randint(low, 1 << bits, (N_OUT, n_groups), generator=generator)
    scales = (torch.rand(N_OUT, n_groups, generator=generator) * 0.02 + 0.01).to(dtype)
    return codes, zeros, scales


def layer(codes, zeros, scales, order):
    linear = torch.nn.Linear(N_IN, N_OUT, bias=False)
    wide = scales.double()[:, order]
    linear.weight.data = ((codes - zeros[:, order]) * wide).float()
    return linear


def digest(weight):
    """Of the bits of a float16 weight [out, in]."""
    return hashlib.sha256(weight.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()


def gptq():
    tensors, metadata = {}, {}
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4, 8):
        for name, group, sym, act in (("sym", 32, True, False), ("asym", 16, False, False), ("act", 32, False, True)):
            for version in (1, 2):
                if version == 2 and bits in (2, 8):
                    continue
                codes, zeros, scales = grid(bits, group, generator)
                if sym:
                    zeros = torch.full_like(zeros, 1 << (bits - 1))
                order = torch.arange(N_IN) // group
                if act:
                    order = order[torch.randperm(N_IN, generator=generator)]
                module = TorchLinear(
                    bits=bits, group_size=group, sym=sym, desc_act=act, in_features=N_IN, out_features=N_OUT,
                    bias=False, register_buffers=True,
                )  # fmt: skip
                module.pack_original(layer(codes, zeros, scales, order), scales.float(), zeros.float(), order.int())
                stored = {end: value.clone() for end, value in module.state_dict().items()}
                if version == 1:
                    plain = module.qzeros.data.clone()
                    convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=group))
                    stored["qzeros"] = module.qzeros.clone()
                    module.qzeros.data = plain
                module.post_init()
                key = f"{name}{bits}v{version}"
                tensors |= {f"{key}.{end}": value for end, value in stored.items()}
                metadata[key] = digest(module.dequantize_weight().t())
    save_file(tensors, HOME / "gptq.safetensors", metadata)


def of_autoawq(name):
    """A module of AutoAWQ's layers, without its package, whose import needs an older transformers."""
    home = next(path for path in map(Path, sys.path) if (path / "awq").is_dir()) / "awq"
    for package in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        folder = str(home.joinpath(*package.split(".")[1:]))
        sys.modules.setdefault(package, types.ModuleType(package)).__path__ = [folder]
    return importlib.import_module(name)


def awq():
    """Without digests of what GEMV restores: it has kernels for GPUs only. Codes are the same in all three forms."""
    generator = torch.Generator().manual_seed(1)
    tensors, metadata = {}, {}
    for group in (32, 64):
        codes, zeros, scales = grid(4, group, generator)
        linear = layer(codes, zeros, scales, torch.arange(N_IN) // group).half()
        linear.weight.data = linear.weight.data.float()
        for form, transposed in (("gemm", True), ("gemv", False), ("gemv_fast", False)):
            made = getattr(of_autoawq(f"awq.modules.linear.{form}"), CLASSES[form]).from_linear(
                linear, 4, group, scales=(scales.t() if transposed else scales).contiguous(),
                zeros=(zeros.t() if transposed else zeros).contiguous(),
            )  # fmt: skip
            stored = {end: value.contiguous() for end, value in made.state_dict().items()}
            tensors |= {f"{form}{group}.{end}": value for end, value in stored.items()}
        restored = of_autoawq("awq.utils.packing_utils").dequantize_gemm(
            tensors[f"gemm{group}.qweight"], tensors[f"gemm{group}.qzeros"], tensors[f"gemm{group}.scales"], 4, group
        )
        metadata[str(group)] = digest(restored.t())
    save_file(tensors, HOME / "awq.safetensors", metadata)


CLASSES = {"gemm": "WQLinear_GEMM", "gemv": "WQLinear_GEMV", "gemv_fast": "WQLinear_GEMVFast"}

if __name__ == "__main__":
    gptq()
    awq()
