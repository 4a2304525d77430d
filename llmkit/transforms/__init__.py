"""Pure functions Checkpoint -> Checkpoint; the CLI command, the recipe step and the Python call are the same function."""

from llmkit.transforms import delta, lora, quantize

__all__ = ["delta", "lora", "quantize"]
