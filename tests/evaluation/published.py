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

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def next_logprobs(self, ids):
        """Log-probabilities of the next token, [vocab]."""
        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0, -1].float(), -1)


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
