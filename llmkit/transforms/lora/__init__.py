"""Adapters: merged into a base, combined with each other, extracted from a tuned model."""

from llmkit.transforms.lora.combine import METHODS, combine, require_method
from llmkit.transforms.lora.extract import extract, survey
from llmkit.transforms.lora.merge import merge
from llmkit.transforms.lora.peft_checkpoint import adapter_of, open_adapter

__all__ = ["METHODS", "adapter_of", "combine", "extract", "merge", "open_adapter", "require_method", "survey"]
