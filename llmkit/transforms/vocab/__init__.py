"""Vocabularies: extend one, trim one, look at one. Pure; no tensor data is read."""

from llmkit.transforms.vocab.extend import extend
from llmkit.transforms.vocab.info import info, open_tokenizer
from llmkit.transforms.vocab.trim import trim

__all__ = ["extend", "info", "open_tokenizer", "trim"]
