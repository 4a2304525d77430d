"""Convert a checkpoint: another file layout, another float dtype."""

from llmkit.transforms.convert.casting import Overflow
from llmkit.transforms.convert.convert import convert
from llmkit.transforms.convert.targets import targets

__all__ = ["Overflow", "convert", "targets"]
