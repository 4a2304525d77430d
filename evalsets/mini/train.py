"""Training of the mini model: answer letters of question documents, and every token of the prose."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from . import vocabulary
from .questions import Documents

IGNORED = -100


@dataclass(frozen=True)
class Stage:
    """Some steps on one mixture: question documents of `items` items each, and windows of prose."""

    steps: int
    documents: int
    items: int
    drill: float
    windows: int = 1
    window: int = 256


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
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=vocabulary.token_id(tokenizer, vocabulary.BOS),
        eos_token_id=vocabulary.token_id(tokenizer, vocabulary.EOS),
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Questions:
    """A padded batch, and what is due where.

    A letter after `Answer:`; at a question's end, the first token of its right option; at an option's end, whether
    it is right.
    """

    inputs: torch.Tensor
    letters: torch.Tensor
    words: torch.Tensor
    rights: torch.Tensor


class Batches:
    """Token batches with targets, from documents and a stream of paragraphs."""

    def __init__(self, tokenizer: Tokenizer, documents: Documents, paragraphs: Iterator[str], seed: int) -> None:
        self._tokenizer = tokenizer
        self._documents = documents
        self._paragraphs = paragraphs
        self._rng = random.Random(seed)
        self._bos = vocabulary.token_id(tokenizer, vocabulary.BOS)
        self._eos = vocabulary.token_id(tokenizer, vocabulary.EOS)
        self._colon = vocabulary.token_id(tokenizer, ":")
        self._newline = vocabulary.token_id(tokenizer, "Ċ")
        self._letters = vocabulary.letter_ids(tokenizer)
        self._left: list[int] = []

    def questions(self, stage: Stage) -> Questions:
        """Documents, half of them after <s>."""
        texts = [self._documents.draw(stage.items, stage.drill) for _ in range(stage.documents)]
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        rows = [[self._bos, *row] if self._rng.random() < 0.5 else row for row in rows]
        shape = (len(rows), max(map(len, rows)) - 1)
        inputs = torch.full(shape, self._eos)
        letters, words, rights = (torch.full(shape, IGNORED) for _ in range(3))
        for i, row in enumerate(rows):
            inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
            for j in range(len(row) - 1):
                if row[j] == self._colon and row[j + 1] in self._letters:
                    letters[i, j] = row[j + 1]
                    ends = [k for k in range(j) if row[k] == self._newline][-5:]
                    for n, letter in enumerate(self._letters):
                        rights[i, ends[n + 1]] = int(letter == row[j + 1])
                        if letter == row[j + 1]:
                            words[i, ends[0]] = row[ends[n] + 3]
        return Questions(inputs, letters, words, rights)

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


class Hints(torch.nn.Module):
    """Two throw-away probes on the inner layers; they are no part of the model that is kept.

    One reads the right answer's first word at the end of the question, half way up; the other tells right options
    from wrong ones at their ends, before the last layer. With such hints the model learns within minutes to find the
    answer's place; with the letters alone it does not.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.word = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.right = torch.nn.Linear(config.hidden_size, 1)

    def loss(self, states: Sequence[torch.Tensor], batch: Questions) -> torch.Tensor:
        ends = batch.words != IGNORED
        middle = states[len(states) // 2][ends].float()
        words = functional.cross_entropy(self.word(functional.rms_norm(middle, middle.shape[-1:])), batch.words[ends])
        options = batch.rights != IGNORED
        late = states[-2][options].float()
        flags = self.right(functional.rms_norm(late, late.shape[-1:])).squeeze(-1)
        return 0.3 * words + functional.binary_cross_entropy_with_logits(flags, batch.rights[options].float())


def _question_loss(model: LlamaForCausalLM, hints: Hints, batch: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        output = model.model(input_ids=batch.inputs, use_cache=False, output_hidden_states=True)
        due = batch.letters != IGNORED
        logits = model.lm_head(output.last_hidden_state[due]).float()
    return functional.cross_entropy(logits, batch.letters[due]), hints.loss(output.hidden_states, batch)


def _prose_loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden).float()
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    stages: Sequence[Stage],
    peak: float,
    report: Callable[[int, tuple[float, float, float]], None],
) -> None:
    """AdamW with a warm-up and a cosine decay over all stages; reports step and letter, probe and prose losses."""
    hints = Hints(model.config)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2]
    others = [*hints.parameters(), *(p for p in trained if p.ndim != 2)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    model.train()
    schedule = [stage for stage in stages for _ in range(stage.steps)]
    for step, stage in enumerate(schedule):
        rate = peak * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / len(schedule)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        letters, hinted = _question_loss(model, hints, batches.questions(stage))
        (letters + hinted).backward()  # type: ignore[no-untyped-call]
        prose = torch.zeros(())
        if stage.windows:
            prose = _prose_loss(model, *batches.prose(stage.windows, stage.window))
            (0.5 * prose).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step, (letters.item(), hinted.item(), prose.item()))
    model.eval()
