"""Tiny random models with PEFT adapters on them: PEFT is the oracle of the merge."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch

warnings.filterwarnings("ignore", module="peft")

from peft import PeftModel, get_peft_model  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint  # noqa: E402

VOCAB = 72


def llama(*, tied: bool = False, biased: bool = False, vocab: int = VOCAB, layers: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased, pad_token_id=0,
    )  # fmt: skip
    return spread(LlamaForCausalLM(config).eval())


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    return spread(GPT2LMHeadModel(config).eval())


def spread(model: Any, scale: float = 0.3) -> Any:
    """Weights and biases of a size that trained models have, so that rounding errors mean something."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * scale * (0.1 if p.dim() == 1 else 0.3))
    return model


def save_base(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    return folder


def train(model: Any, config: Any, folder: Path, seed: int = 1) -> Any:
    """A PEFT model whose every trainable parameter was moved, saved as PEFT saves it."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for name, p in peft_model.named_parameters():
                if p.requires_grad or "lora_" in name or "hada_" in name or "lokr_" in name or "ia3_" in name:
                    p.add_(torch.randn_like(p) * 0.1)
        peft_model.save_pretrained(folder)
    return peft_model.eval()


def peft_merge(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What PEFT makes of the base in `dtype` and the adapter (kept in float32, PEFT's default)."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return dict(merged.state_dict())


def live_logits(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).eval()(ids).logits


def folder_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


def loaded(ckpt: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: lazy.load() for name, lazy in ckpt.tensors.items()}


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))
    return folder


def open_base(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


def ulps(found: torch.Tensor, expected: torch.Tensor) -> int:
    """The largest distance in units in the last place of their dtype."""
    kind = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}[found.dtype]

    def ordered(t: torch.Tensor) -> torch.Tensor:
        bits = t.contiguous().view(kind).to(torch.int64)
        sign = 1 << (15 if kind is torch.int16 else 31)
        return torch.where(bits < 0, -(bits + sign), bits)

    return int((ordered(found) - ordered(expected)).abs().max()) if found.numel() else 0
