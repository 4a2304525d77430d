"""Training of the mini model: answer letters of question documents, and every token of the prose."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from . import vocabulary

IGNORED = -100


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    peak: float
    warmup: int
    documents: int = 8
    windows: int = 1
    window: int = 1024


def new_model(tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """A fresh Llama-layout model; every input width is a multiple of 64, so that groups of 64 divide it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=vocabulary.MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id(vocabulary.BOS),
        eos_token_id=tokenizer.token_to_id(vocabulary.EOS),
    )
    return LlamaForCausalLM(config)


class Batches:
    """Token batches with targets, from streams of documents and paragraphs."""

    def __init__(self, tokenizer: Tokenizer, documents: Iterator[str], paragraphs: Iterator[str], seed: int) -> None:
        self._tokenizer = tokenizer
        self._documents = documents
        self._paragraphs = paragraphs
        self._rng = random.Random(seed)
        self._bos: int = tokenizer.token_to_id(vocabulary.BOS)
        self._eos: int = tokenizer.token_to_id(vocabulary.EOS)
        self._colon: int = tokenizer.token_to_id(":")
        self._letters = {tokenizer.token_to_id("Ġ" + letter) for letter in "ABCD"}
        self._left: list[int] = []

    def questions(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded documents, half of them after <s>; the targets are the answer letters alone."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(islice(self._documents, count)))]
        rows = [[self._bos, *row] if self._rng.random() < 0.5 else row for row in rows]
        width = max(map(len, rows)) - 1
        inputs = torch.full((count, width), self._eos)
        targets = torch.full((count, width), IGNORED)
        for i, row in enumerate(rows):
            inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
            for j in range(len(row) - 1):
                if row[j] == self._colon and row[j + 1] in self._letters:
                    targets[i, j] = row[j + 1]
        return inputs, targets

    def prose(self, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Paragraphs one after the other in full windows, each window after <s>."""
        rows = []
        for _ in range(count):
            while len(self._left) < width:
                texts = [paragraph + "\n\n" for paragraph in islice(self._paragraphs, 64)]
                self._left.extend(i for encoding in self._tokenizer.encode_batch(texts) for i in encoding.ids)
            rows.append([self._bos, *self._left[:width]])
            del self._left[:width]
        tokens = torch.tensor(rows)
        return tokens[:, :-1], tokens[:, 1:]


def _loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy at the positions that have a target; the head is computed only there."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        scored = targets != IGNORED
        logits = model.lm_head(hidden[scored])
    return functional.cross_entropy(logits.float(), targets[scored])


def train(
    model: LlamaForCausalLM, batches: Batches, schedule: Schedule, report: Callable[[int, float, float], None]
) -> None:
    """AdamW with a linear warm-up and a cosine decay; calls `report(step, question_loss, prose_loss)`."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.98), fused=True)
    model.train()
    for step in range(schedule.steps):
        progress = step / schedule.steps
        rate = min((step + 1) / schedule.warmup, 0.5 + 0.5 * math.cos(math.pi * progress)) * schedule.peak
        for group in optimizer.param_groups:
            group["lr"] = rate
        asked = _loss(model, *batches.questions(schedule.documents))
        asked.backward()  # type: ignore[no-untyped-call]
        read = _loss(model, *batches.prose(schedule.windows, schedule.window))
        read.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step, asked.item(), read.item())
    model.eval()
