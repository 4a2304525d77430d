"""A tiny random model of every family on disk, with a tokenizer, and what transformers and PEFT make of it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import vocab_world

from llmkit.api import save
from llmkit.architecture.architecture import Architecture
from llmkit.architecture.registry import default_registry, require
from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.decoder.contract import random_checkpoint
from llmkit.transforms.vocab.config_ids import TABLE_KEY

TOKENIZER = vocab_world.byte_level(vocab_world.ENGLISH, 300)
VOCAB: dict[str, int] = json.loads(TOKENIZER)["model"]["vocab"]
# Releases that store, tie or project otherwise than the tiny model of their family.
RELEASES = {
    "bloom": ["untied"], "falcon": ["rw-1b", "11b"], "gpt2": ["cerebras"], "gpt_neox": ["redpajama", "tied"],
    "gemma4": ["31b"], "llama": ["tied", "attention-bias"], "opt": ["350m", "no-final-norm"],
}  # fmt: skip
ARCHITECTURES = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}
_WITHOUT_OUT = {"falcon_h1", "falcon_mamba", "mamba", "mamba2"}  # PEFT refuses adapters on their `out_proj`
CASES = [(name, variant) for name in ARCHITECTURES for variant in (None, *RELEASES.get(name, ()))]
IDS = [f"{name}-{variant}" if variant else name for name, variant in CASES]


def config_of(architecture: Architecture, variant: str | None) -> dict[str, Any]:
    """The tiny config with a row for each token of `TOKENIZER`."""
    return with_rows(architecture, architecture.tiny_config(variant))


def with_rows(architecture: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """A config with a row for each token of `TOKENIZER`."""
    keys = [architecture.bind(config).dims.keys["vocab"], *(k for k in (TABLE_KEY,) if k in config)]
    return config | dict.fromkeys(keys, len(VOCAB)) | {"dtype": "float32"}


def written(folder: Path, name: str, variant: str | None) -> Path:
    """The base model as a folder."""
    architecture = ARCHITECTURES[name]
    ckpt = random_checkpoint(architecture, config_of(architecture, variant))
    # transformers 4 takes the class by model_type where none is named, which adds tokens of its own.
    files = {"tokenizer.json": TOKENIZER, "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'}
    save(ckpt.derive(files={name: FileContent(data=text.encode()) for name, text in files.items()}), folder)
    return folder


def moved(base: Checkpoint, folder: Path, only: list[str] | None = None) -> Checkpoint:
    """The base with every weight (or those of the modules `only`) moved a little, as a fine-tuning does it."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    folder.mkdir()
    tuned = {n: t.load() for n, t in base.tensors.items()}
    chosen = tuned if only is None else [f"{module}.weight" for module in only]
    tuned |= {n: tuned[n] + 0.01 * torch.randn(tuned[n].shape, generator=generator) for n in chosen}
    save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(base.config)))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return open_checkpoint(folder)


def loaded(ckpt: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: lazy.load() for name, lazy in ckpt.tensors.items()}


def layers_of(ckpt: Checkpoint) -> list[str]:
    """The modules of the linear layers."""
    model = require(ckpt.config, ckpt.label).bind(ckpt.config)
    return [s.name.removesuffix(".weight") for s in model.slots.values() if s.kind == "linear" and not s.stack]


def adapted_layers_of(ckpt: Checkpoint) -> list[str]:
    """Those that PEFT puts an adapter on."""
    is_refused = ckpt.config["model_type"] in _WITHOUT_OUT
    return [n for n in layers_of(ckpt) if not (is_refused and n.endswith(".out_proj"))]


def has_experts(ckpt: Checkpoint) -> bool:
    """Whether files hold experts one by one."""
    return any(".experts." in module for module in layers_of(ckpt))


def is_known_to_peft(ckpt: Checkpoint) -> bool:
    """Whether PEFT's adapters name the layers as files do: transformers 5 stacks experts, and PEFT then takes the names
    of their layers for those of the stacks, also where a dense or a shared MLP has the same."""
    slots = require(ckpt.config, ckpt.label).bind(ckpt.config).slots
    if has_experts(ckpt) and not transformers.__version__.startswith("4."):
        from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN as stacked

        if ckpt.config["model_type"] not in stacked:  # PEFT leaves its experts out
            return False
    others = [s for s in slots if s.endswith(".gate.weight") and ".mlp." in s and ".experts." not in s]
    return is_in_transformers(ckpt.config) and not (has_experts(ckpt) and others)


def is_in_transformers(config: Any) -> bool:
    return config["model_type"] in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@contextmanager
def quiet() -> Iterator[None]:
    bars = transformers.utils.logging
    bars.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    bars.enable_progress_bar()


def by_transformers(folder: Path, attention: str) -> Any:
    """transformers' own model of a folder."""
    with quiet():
        auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype="auto", attn_implementation=attention).eval()


def peft_adapter(model: Any, folder: Path, layers: list[str], *, transposed: bool) -> None:
    """An adapter on these layers, every matrix of it random, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    last = {m: m.rpartition(".")[2] for m in layers}
    targets = sorted({m if last[m].isdigit() else last[m] for m in layers})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=transposed)
    with quiet(), torch.no_grad():
        adapted = get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(2)
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        adapted.save_pretrained(folder)


def peft_model(model: Any, adapter: Path) -> Any:
    """The model with an adapter on it, not merged."""
    from peft import PeftModel

    with quiet():
        return PeftModel.from_pretrained(model, adapter).eval()


def peft_merged(model: Any, adapter: Path, folder: Path) -> Checkpoint:
    """What PEFT's own merge saves."""
    from peft import PeftModel

    with quiet():
        PeftModel.from_pretrained(copy.deepcopy(model), adapter).merge_and_unload().save_pretrained(folder)
    return open_checkpoint(folder)


def adapter_by_hand(base: Checkpoint, folder: Path, layers: list[str]) -> dict[str, torch.Tensor]:
    """An adapter in PEFT's layout for a class that only its authors' code has, and the weights it must give."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(2)
    folder.mkdir()
    tensors, expected = {}, {}
    for module in layers:
        weight = base.tensors[f"{module}.weight"].load()
        a = 0.1 * torch.randn(4, weight.shape[1], generator=generator)
        b = 0.1 * torch.randn(weight.shape[0], 4, generator=generator)
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        expected[f"{module}.weight"] = weight + 2.0 * (b @ a)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "fan_in_fan_out": False, "bias": "none",
        "target_modules": sorted({m.rpartition(".")[2] for m in layers}), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return expected
