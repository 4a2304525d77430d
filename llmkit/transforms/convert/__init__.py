"""Convert a checkpoint: another file layout, another float dtype."""

from llmkit.transforms.convert.casting import Overflow
from llmkit.transforms.convert.convert import convert
from llmkit.transforms.convert.targets import TARGETS

__all__ = ["TARGETS", "Overflow", "convert"]
