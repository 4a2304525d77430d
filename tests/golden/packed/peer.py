"""Show that GPTQModel loads what llmkit writes: logits beside llmkit's dequantized model.

    python tests/golden/packed/peer.py write FOLDER      in llmkit's environment: models, and logits of each
    python tests/golden/packed/peer.py load FOLDER       in that of record.py (for transformers also optimum)

GPTQModel 7.7.0 on the CPU: GPTQ of 2, 3, 4 and 8 bits within 3e-5 in float32. AWQ, whose weights it restores and
multiplies in float16, within 3e-2; with the same integers and scales in float32, within 1e-5.
"""

import shutil
import sys
from pathlib import Path

import torch

KINDS = {
    "gptq-2": {"bits": 2, "format": "gptq", "group_size": 32}, "gptq-3": {"bits": 3, "format": "gptq"},
    "gptq-4": {"bits": 4, "format": "gptq"}, "gptq-8": {"bits": 8, "format": "gptq"},
    "gptq-channel": {"bits": 4, "format": "gptq", "group_size": "channel"},
    "gptq-keep": {"bits": 4, "format": "gptq", "keep": ("*.down_proj",)},
    "gptq_v2": {"bits": 4, "format": "gptq_v2", "symmetric": False}, "awq": {"bits": 4, "format": "awq"},
}  # fmt: skip
IDS = torch.arange(24).view(2, 12)


def write(home):
    import llmkit
    from llmkit.checkpoint.quantized import dequantized
    from llmkit.tensors.spec import DType
    from llmkit.transforms.quantize import quantize

    root = Path(__file__).parents[3]
    sys.path.insert(0, str(root))
    from tests.transforms.test_quantize import write_model

    home.mkdir(parents=True)
    write_model(home / "float", torch.float16, hidden=128, ffn=256)
    for name, options in KINDS.items():
        llmkit.save(quantize(llmkit.open_checkpoint(home / "float"), **options), home / name)
        for file in (root / "evalsets" / "mini" / "base").glob("tokenizer*"):
            shutil.copy(file, home / name)
        floats = dequantized(llmkit.open_checkpoint(home / name), dtype=DType.F32)
        with torch.no_grad():
            torch.save(llmkit.load_decoder(floats, dtype="float32")(IDS), home / f"{name}.pt")


def load(home):
    from gptqmodel import BACKEND, GPTQModel

    for name in KINDS:
        wanted = torch.load(home / f"{name}.pt")
        backend = BACKEND.AWQ_TORCH if name == "awq" else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(str(home / name), device="cpu", backend=backend, dtype=torch.float16).model
        _report(name, model, wanted)
        if name == "awq":
            _in_float32()
            _report("awq in float32", model, wanted)


def _report(name, model, wanted):
    with torch.no_grad():
        error = (model.float()(IDS).logits.float() - wanted).abs().max()
    print(f"RESULT {name} {error:.2e} of {wanted.abs().max():.1f}", flush=True)


def _in_float32():
    """AWQ's layers restore and multiply in float32, by the library's own unpacking."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    def forward(self, x):
        weight = dequantize_gemm(self.qweight, self.qzeros, self.scales.float(), self.bits, self.group_size)
        return torch.nn.functional.linear(x, weight.t(), self.bias)

    AwqTorchLinear.forward = forward


if __name__ == "__main__":
    {"write": write, "load": load}[sys.argv[1]](Path(sys.argv[2]))
