"""Every loader finds codes where it looks for them, and floats in its other linear layers: experts, states, gates.

Which linear layers a loader takes for quantized ones is asked of its own code, on a random model; what it computes, of
transformers with compressed-tensors. Both run with the oldest versions, too: classes of transformers 4 have linear
layers where those of 5 have parameters.
"""

from __future__ import annotations

import re
import sys
import types
from contextlib import nullcontext
from itertools import product

import family_world as world
import pytest
import torch
import transformers
from rotation import rotated
from transformers.pytorch_utils import Conv1D

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder.contract import random_checkpoint, random_ids
from llmkit.decoder.load import load_decoder
from llmkit.quantization.codec import folder_codec
from llmkit.quantization.matrix import Grid
from llmkit.transforms.layers import choose_layers, spelled_for
from llmkit.transforms.quantize import quantize
from tests.quantization.lazies import zeros_on

IS_4 = transformers.__version__.startswith("4.")
UNREAD = re.compile(f"^transformers {transformers.__version__[0]} (does not read|loads experts without)", re.MULTILINE)


def has_more_than_linear_layers(architecture):
    """Matrices, convolutions or states besides linear layers, or experts."""
    slots = architecture.bind(architecture.tiny_config()).slots.values()
    return any(slot.is_of_expert or (slot.kind == "parameter" and len(slot.shape) > 1) for slot in slots)


def has_linear_layers(architecture):
    """Not the Conv1D ones of GPT-2."""
    slots = architecture.bind(architecture.tiny_config()).slots.values()
    return not any(slot.is_transposed and not slot.stack for slot in slots)


KNOWN = [n for n, a in world.ARCHITECTURES.items() if world.is_in_transformers(a.tiny) and has_linear_layers(a)]
FAMILIES = [name for name in KNOWN if has_more_than_linear_layers(world.ARCHITECTURES[name])]


class Taken(torch.nn.Module):
    """What stands where a loader expects codes."""

    def __init__(self, *args, **settings):
        super().__init__()


def by_awq(monkeypatch, model, entry):
    from transformers.integrations import awq
    from transformers.utils.quantization_config import AwqConfig

    if IS_4:
        from transformers.integrations.bitsandbytes import get_keys_to_not_convert
    else:
        from transformers.quantizers.base import get_keys_to_not_convert

    members = {  # of transformers 4 and 5
        "awq.modules.linear.gemm": {"WQLinear_GEMM": Taken},
        "gptqmodel.quantization": {"METHOD": types.SimpleNamespace(AWQ="awq")},
        "gptqmodel.utils.importer": {"hf_select_quant_linear_v2": lambda **settings: Taken},
    }
    modules = {stem: types.ModuleType(stem) for name in members for stem in stems_of(name)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        vars(module).update(members.get(name, {}))
    monkeypatch.setattr(awq, "is_auto_awq_available", lambda: True, raising=False)
    if IS_4:  # asks for the version of the library
        monkeypatch.setattr(AwqConfig, "post_init", lambda config: None)
    config = AwqConfig(**entry)
    skipped = [*get_keys_to_not_convert(model), *config.modules_to_not_convert]  # as the quantizer has it
    awq.replace_with_awq_linear(model, quantization_config=config, modules_to_not_convert=skipped)
    return {name for name, module in model.named_modules() if isinstance(module, Taken)}


def stems_of(name):
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def by_bitsandbytes(monkeypatch, model, entry):
    from transformers.integrations import bitsandbytes
    from transformers.utils.quantization_config import BitsAndBytesConfig

    classes = types.SimpleNamespace(nn=types.SimpleNamespace(Linear8bitLt=Taken, Linear4bit=Taken))
    members = {"bnb": classes, "nn": torch.nn, "Conv1D": Conv1D, "init_empty_weights": nullcontext}
    for member, value in members.items():
        monkeypatch.setattr(bitsandbytes, member, value, raising=False)
    config = BitsAndBytesConfig(**entry)
    bitsandbytes.replace_with_bnb_linear(model, list(config.llm_int8_skip_modules), quantization_config=config)
    return {name for name, module in model.named_modules() if isinstance(module, Taken)}


def by_compressed_tensors(monkeypatch, model, entry):
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    apply_quantization_config(model, QuantizationConfig.model_validate(entry))
    return {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}


def by_gptqmodel(monkeypatch, model, entry):
    """`dynamic` as GPTQModel and vLLM read it: what a rule that begins with -: matches is none."""
    rules = [re.compile(rule[2:]) for rule in entry.get("dynamic", ()) if rule.startswith("-:")]
    layers = {n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name for name in layers if not any(rule.match(name) for rule in rules)}


def by_optimum(monkeypatch, model, entry):
    from optimum.gptq import GPTQQuantizer

    quantizer, taken = object.__new__(GPTQQuantizer), []  # its constructor asks for the library with the kernels
    quantizer.block_name_to_quantize = entry.get("block_name_to_quantize")
    quantizer.modules_in_block_to_quantize = entry.get("modules_in_block_to_quantize")
    quantizer.select_quant_linear = lambda **settings: None
    quantizer._replace_by_quant_layers = lambda model, layers: taken.extend(layers)
    quantizer.convert_model(model)
    return set(taken)


LOADERS = {
    "compressed-tensors": ("compressed-tensors", by_compressed_tensors), "awq": ("awq", by_awq),
    "bitsandbytes": ("bitsandbytes", by_bitsandbytes), "gptqmodel": ("gptq", by_gptqmodel),
    "optimum": ("gptq", by_optimum),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "loader"),
    [*product(FAMILIES, LOADERS), *rotated([name for name in KNOWN if name not in FAMILIES], list(LOADERS))],
)
def test_a_loader_takes_the_layers_that_are_quantized(monkeypatch, name, loader):
    if loader == "optimum":
        pytest.importorskip("optimum.gptq")
    format, taken_by = LOADERS[loader]
    codec, architecture = folder_codec(format), world.ARCHITECTURES[name]
    base = spelled_for(random_checkpoint(architecture, architecture.tiny_config()), codec)
    layers = choose_layers(base, [], [], codec)
    modules = [weight.removesuffix(".weight") for weight in layers.names]
    entry = codec.describe(dict.fromkeys(modules, zeros_on(Grid(8))), layers.ignored, are_all=layers.are_all)
    config = transformers.AutoConfig.for_model(**base.config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {module for module, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    expected = {base.model.names.loaded(module) for module in modules} & linear
    assert expected
    if loader == "bitsandbytes" and UNREAD.match(architecture.loader_limits.get("SCB", "")):
        expected = set()
    assert taken_by(monkeypatch, model, entry) == expected


WAYS = {
    "int4": {"bits": 4, "symmetric": True, "group_size": "channel"},
    "int4 with zero points": {"bits": 4, "symmetric": False, "group_size": "channel"},
    "int8": {"bits": 8, "symmetric": True, "group_size": "channel"}, "fp8": {"bits": 8, "type": "fp8"},
    "int8 inputs": {"bits": 8, "activations": "int8"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "way"), rotated([*FAMILIES, "falcon"], list(WAYS)))
def test_transformers_computes_what_we_do_unless_the_plan_says_otherwise(tmp_path, name, way):
    architecture = world.ARCHITECTURES[name]
    base = open_checkpoint(world.written(tmp_path / "base", name, None))
    quantized = quantize(base, method="rtn", **WAYS[way])
    save(quantized, tmp_path / "q")
    ids = random_ids(architecture, base.config)
    ours = load_decoder(open_checkpoint(tmp_path / "q"))(ids)
    try:
        model = world.by_transformers(tmp_path / "q", architecture.reference_attention)
        for module in model.modules():
            module.quantization_enabled = False  # inputs stay as they are, too
        with torch.no_grad():
            found = float((ours - model(ids).logits).abs().max() / ours.abs().max().clamp(min=1))
        is_read = found <= 1e-5
    except (RuntimeError, AttributeError) as error:
        is_read, found = False, str(error)
    limits = UNREAD.search("\n".join(quantized.notes))
    assert is_read == (limits is None), (found, quantized.notes)
