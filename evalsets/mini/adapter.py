"""The adapter: LoRA on the tuned model that teaches it the one subject it does not know, trained with peft."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from . import world
from .prose import Prose
from .questions import Documents, Split
from .train import Batches, Stage, train

RANK = 16
SUBJECTS = dict.fromkeys(world.BASE_SUBJECTS + world.TUNED_SUBJECTS, 0.25) | dict.fromkeys(world.UNTAUGHT_SUBJECTS, 3.0)
STAGE = Stage(steps=450, documents=8, items=6, drill=0.05)
PEAK = 4e-3


def train_adapter(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    split: dict[str, Split],
    vale: world.World,
    stage: Stage,
    report: Callable[[int, tuple[float, float, float]], None],
) -> LlamaForCausalLM:
    """Train an adapter on `model`, write it to `out` as peft does, in half precision; return it merged by peft."""
    torch.manual_seed(world.SEED + 3)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    batches = Batches(tokenizer, Documents(split, SUBJECTS, "adapter"), Prose(vale, SUBJECTS).paragraphs("adapter"), 3)
    train(model, batches, (stage,), PEAK, report)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(torch.float16).float()
    adapted.save_pretrained(str(out))
    (out / "README.md").unlink()
    weights = out / "adapter_model.safetensors"
    halves = {name: weight.to(torch.float16) for name, weight in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    settings = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": "llmkit-mini-tuned", "target_modules": sorted(settings["target_modules"])}
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    merged: LlamaForCausalLM = adapted.merge_and_unload()
    return merged
