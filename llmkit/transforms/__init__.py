"""Pure functions Checkpoint -> Checkpoint: the command, the recipe step and the Python call are the same function."""

from llmkit.transforms import convert, delta, lora, quantize, vocab

__all__ = ["convert", "delta", "lora", "quantize", "vocab"]
