"""Adapters: merged into a base, combined with each other, extracted from a tuned model."""

from llmkit.transforms.lora.merge import merge
from llmkit.transforms.lora.opening import open_adapter

__all__ = ["merge", "open_adapter"]
