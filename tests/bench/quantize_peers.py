"""Other tools that quantize, for quantize_quality.py: run by the Python of an environment that has the tool.

    python tests/bench/quantize_peers.py gptqmodel|autoround|hqq|llmcompressor|llmcompressor_awq SETTINGS MODEL OUT

SETTINGS is JSON: bits, group, symmetric and `ids`, a file with the windows of token ids to calibrate on. Linear layers
are quantized, the embedding and the head are not. OUT is a folder that llmkit reads: quantized (GPTQ, or
compressed-tensors), or, of hqq, the floats that the integers stand for, as it restores them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def gptqmodel(model: str, out: str, ids: list[list[int]], bits: int, group: int, symmetric: bool) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with the one that it takes on two cores it does not start
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=group, sym=symmetric)
    # As the others: its own choice on a CPU is bfloat16, which is slow where the CPU has no products of it.
    quantized = GPTQModel.load(model, config, device="cpu", backend=BACKEND.TORCH, dtype=torch.float32)
    quantized.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=4)
    quantized.save(out)


def autoround(model: str, out: str, ids: list[list[int]], bits: int, group: int, symmetric: bool) -> None:
    from auto_round import AutoRound

    batches = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in ids]
    rounding = AutoRound(
        load(model), AutoTokenizer.from_pretrained(model), bits=bits, group_size=group, sym=symmetric,
        dataset=batches, nsamples=len(ids), seqlen=len(ids[0]), batch_size=4, device_map="cpu",
    )  # fmt: skip
    rounding.quantize_and_save(out, format="auto_gptq")
    for made in [path for path in Path(out).iterdir() if path.is_dir()]:  # it adds a folder of its own
        for path in made.iterdir():
            path.rename(Path(out) / path.name)


def hqq(model: str, out: str, ids: list[list[int]], bits: int, group: int, symmetric: bool) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    if symmetric:
        raise SystemExit("hqq has zero points: no symmetric grid")
    floats = load(model)
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    for name, module in floats.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            copy = torch.nn.Linear(*reversed(module.weight.shape), bias=False)
            copy.weight.data = module.weight.data.clone()
            quantized = HQQLinear(copy, config, compute_dtype=torch.float32, device="cpu")
            module.weight.data = quantized.dequantize().to(module.weight.dtype)
    floats.save_pretrained(out)


def llmcompressor(model: str, out: str, ids: list[list[int]], bits: int, group: int, symmetric: bool) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier

    run_llmcompressor(model, out, ids, [GPTQModifier(**llmcompressor_scheme(bits, group, symmetric))])


def llmcompressor_awq(model: str, out: str, ids: list[list[int]], bits: int, group: int, symmetric: bool) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # asked for without a look, which fails where there is no GPU
    rounded = QuantizationModifier(**llmcompressor_scheme(bits, group, symmetric))
    run_llmcompressor(model, out, ids, [AWQModifier(duo_scaling="both"), rounded])


def llmcompressor_scheme(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    return {"ignore": ["lm_head"], "config_groups": groups}


def run_llmcompressor(model: str, out: str, ids: list[list[int]], recipe: list[Any]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    floats = load(model)
    oneshot(
        model=floats, dataset=data, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=len(ids[0])
    )  # fmt: skip
    floats.save_pretrained(out, save_compressed=True)


def main() -> None:
    name, settings, model, out = sys.argv[1:]
    options = json.loads(settings)
    ids = json.loads(Path(options["ids"]).read_text())
    torch.manual_seed(0)
    globals()[name](model, out, ids, options["bits"], options["group"], options["symmetric"])
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


if __name__ == "__main__":
    main()
