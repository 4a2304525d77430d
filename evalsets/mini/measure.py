"""Accuracy and perplexity of the mini models in plain torch, with a plain quantizer to compare against."""

import math
from collections.abc import Mapping, Sequence

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaForCausalLM

from . import vocabulary
from .questions import Item, document

Exams = Mapping[str, tuple[Sequence[Item], Sequence[Item]]]
Weights = dict[str, torch.Tensor]
SHOTS = 2


@torch.inference_mode()
def accuracies(
    model: LlamaForCausalLM, tokenizer: Tokenizer, exams: Exams, shots: int = SHOTS, bos: bool = False
) -> dict[str, float]:
    """Per cent of right choices by subject: the letter of the highest probability after `Answer:`."""
    letters = vocabulary.letter_ids(tokenizer)
    start = [vocabulary.token_id(tokenizer, vocabulary.BOS)] if bos else []
    found = {}
    for subject, (dev, test) in exams.items():
        rows = [start + tokenizer.encode(document(subject, dev[:shots], item)).ids for item in test]
        right = 0
        for at in range(0, len(rows), 40):
            part = rows[at : at + 40]
            ends = torch.tensor([len(row) - 1 for row in part])
            inputs = torch.zeros(len(part), int(ends.max()) + 1, dtype=torch.long)
            for i, row in enumerate(part):
                inputs[i, : len(row)] = torch.tensor(row)
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            scores = model.lm_head(hidden[torch.arange(len(part)), ends])[:, letters]
            answers = torch.tensor([item.answer for item in test[at : at + 40]])
            right += int((scores.argmax(-1) == answers).sum())
        found[subject] = round(100 * right / len(test), 2)
    return found


def overall(found: Mapping[str, float], exams: Exams) -> float:
    """Per cent over all questions."""
    total = sum(len(test) for _, test in exams.values())
    return round(sum(found[subject] * len(test) for subject, (_, test) in exams.items()) / total, 2)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, window: int = 256) -> float:
    """The exponential of the mean negative log-likelihood of a token, in separate windows that begin with <s>."""
    ids = tokenizer.encode(text).ids
    bos = vocabulary.token_id(tokenizer, vocabulary.BOS)
    total = 0.0
    for at in range(0, len(ids), window):
        row = torch.tensor([[bos, *ids[at : at + window]]])
        logits = model(input_ids=row[:, :-1], use_cache=False).logits
        total += functional.cross_entropy(logits[0].float(), row[0, 1:], reduction="sum").item()
    return round(math.exp(total / len(ids)), 3)


def quantizable(name: str, tensor: torch.Tensor) -> bool:
    """The matrices of the layers: neither norms, nor the embedding, nor the head."""
    return tensor.ndim == 2 and name.startswith("model.layers.")


def int8(weight: torch.Tensor) -> torch.Tensor:
    """Round to nearest, symmetric, one scale a row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
    return (weight / scale).round().clamp(-128, 127) * scale


def int4(weight: torch.Tensor, group: int = 64) -> torch.Tensor:
    """Round to nearest, symmetric, one scale for every 64 inputs of a row."""
    rows = weight.reshape(weight.shape[0], -1, group)
    scale = rows.abs().amax(dim=2, keepdim=True) / 7.5
    return ((rows / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


def quantized(weights: Weights, bits: int) -> Weights:
    """The weights as a quantizer of 8 or 4 bits would leave them."""
    quantize = {8: int8, 4: int4}[bits]
    return {name: quantize(w.float()) if quantizable(name, w) else w for name, w in weights.items()}


def load(model: LlamaForCausalLM, weights: Weights) -> LlamaForCausalLM:
    """Put half-precision weights into the model, which computes in float32."""
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    model.eval()
    return model
