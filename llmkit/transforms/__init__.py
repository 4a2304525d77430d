"""Pure functions Checkpoint -> Checkpoint: the command, the recipe step and the Python call are the same function."""

from llmkit.transforms import delta, lora, quantize, vocab

__all__ = ["delta", "lora", "quantize", "vocab"]
