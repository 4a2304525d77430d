"""What a checkpoint can be converted to: one entry for each layout.

A target gets a float (or, where it says so, any) checkpoint as transformers lays it out, and gives one whose tensors,
config, files and container are those of the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.formats.container import SafetensorsFiles
from llmkit.formats.torch_zip import TorchFiles

__all__ = ["TARGETS", "Target"]

Write = Callable[..., Checkpoint]


@dataclass(frozen=True, slots=True)
class Target:
    """A layout that can be written.

    Attributes:
        summary: what it is, in a few words, for help.
        write: the checkpoint in this layout; `options` are its keyword arguments.
        options: names of the options it takes.
        takes_quantized: whether a quantized checkpoint goes there as it is.
    """

    summary: str
    write: Write
    options: Mapping[str, str]
    takes_quantized: bool = False


def _hf(ckpt: Checkpoint) -> Checkpoint:
    return ckpt.derive(container=SafetensorsFiles())


def _bin(ckpt: Checkpoint) -> Checkpoint:
    return ckpt.derive(container=TorchFiles())


_NONE: dict[str, Any] = {}
TARGETS: dict[str, Target] = {
    "hf": Target("safetensors, as transformers writes them", _hf, _NONE, takes_quantized=True),
    "bin": Target("PyTorch's zip files (pytorch_model.bin)", _bin, _NONE, takes_quantized=True),
}
