"""What published scripts compute, done anew from their description: one prompt, one forward, no sharing.

Each class says how a script writes the prompt of a question, and which token ids it reads after it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

LETTERS = "ABCD"


def ids_hash(ids):
    """Of token ids, as records have it."""
    return hashlib.sha256(b"".join(int(i).to_bytes(8, "little", signed=True) for i in ids)).hexdigest()[:16]


class PlainModel:
    """transformers' own forward over one whole sequence at a time."""

    def __init__(self, folder: Path, tokenizer=None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def next_logprobs(self, ids):
        """Log-probabilities of the next token, [vocab]."""
        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float(), -1)


class LlamaPieces:
    """LLaMA's tokenizer by SentencePiece alone, with the calls that scripts make of transformers'."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._pieces = SentencePieceProcessor(model_file=str(file))
        self.convert_tokens_to_ids = self._pieces.piece_to_id

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + self._pieces.encode(text)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self.encode(text, add_special_tokens)}


def score_subject(plain, script, subject, dev, rows, limit):
    """By question: hash of the prompt's ids, choice, log-probabilities of the letters."""
    results = []
    for row in rows:
        ids = script.prompt_ids(plain.tokenizer, subject, dev, row, limit)
        logprobs = plain.next_logprobs(ids)[script.letter_ids(plain.tokenizer, ids)]
        results.append((ids_hash(ids), LETTERS[int(logprobs.argmax())], logprobs.tolist()))
    return results


class Hendrycks:
    """hendrycks/test, evaluate.py, over a model that shows its ids."""

    def block(self, row):
        text = row[0]
        for j in range(4):
            text += "\n" + "ABCD"[j] + ". " + row[1 + j]
        return text + "\nAnswer:"

    def prompt_ids(self, tokenizer, subject, dev, row, limit):
        k = len(dev)
        while True:
            text = "The following are multiple choice questions (with answers) about "
            text += " " + " ".join(subject.split("_")) + ".\n\n"
            for shot in dev[:k]:
                text += self.block(shot) + " " + shot[5] + "\n\n"
            ids = tokenizer(text + self.block(row))["input_ids"]
            if len(ids) <= limit:
                self.text, self.k = text + self.block(row), k
                return ids
            k -= 1

    def letter_ids(self, tokenizer, ids):
        joint = [tokenizer(self.text + " " + letter)["input_ids"] for letter in LETTERS]
        assert all(whole[:-1] == ids for whole in joint)
        return [whole[-1] for whole in joint]


class CEval:
    """hkust-nlp/ceval, evaluators/llama.py: rows are question, A to D, answer."""

    def block(self, row):
        text = row[0]
        for letter, choice in zip("ABCD", row[1:5], strict=True):
            text += "\n" + letter + ". " + choice
        return text + "\n答案："

    def prompt_ids(self, tokenizer, subject, dev, row, limit):
        shots = list(dev)
        while True:
            text = "以下是中国关于" + subject + "考试的单项选择题，请选出其中的正确答案。\n\n"
            for shot in shots:
                text += self.block(shot) + shot[5] + "\n\n"
            ids = tokenizer(text + self.block(row))["input_ids"]
            self.k = len(shots)
            if len(ids) <= limit:
                return ids
            shots.pop()

    def letter_ids(self, tokenizer, ids):
        return [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]


class CMMLU:
    """haonan-li/CMMLU, mp_utils.py and hf_causal_model.py."""

    def example(self, row, answer):
        text = "题目：" + row[0]
        for letter, choice in zip("ABCD", row[1:5], strict=True):
            text += "\n" + letter + ". " + choice
        return text + "\n答案是：" + (row[5] + "\n\n" if answer else "")

    def prompt_ids(self, tokenizer, subject, dev, row, limit):
        head = "以下是关于" + subject + "的单项选择题，请直接给出正确答案的选项。\n\n"
        end = self.example(row, answer=False)
        used = len(tokenizer.encode(head) + tokenizer.encode(end))
        if used > limit:
            self.k = -1
            return tokenizer(end)["input_ids"]
        shots = [(self.example(r, answer=True), len(tokenizer.encode(self.example(r, answer=True)))) for r in dev]
        while shots != [] and sum(n for _, n in shots) >= limit - used:
            longest = max(n for _, n in shots)
            shots = [(text, n) for text, n in shots if n != longest]
        self.k = len(shots)
        return tokenizer(head + "".join(text for text, _ in shots) + end)["input_ids"]

    def letter_ids(self, tokenizer, ids):
        return [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]
