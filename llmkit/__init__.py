"""llmkit: a workbench for open LLM checkpoints.

A script, from headers to logits:

    import llmkit
    base, delta = llmkit.open_checkpoint("llama-7b"), llmkit.open_checkpoint("vicuna-7b-delta-v1.1")
    tuned = llmkit.transforms.delta.apply(base, delta)      # pure: Checkpoint -> Checkpoint, no data read
    llmkit.plan(tuned, "vicuna-7b")                         # the dry run
    llmkit.save(tuned, "vicuna-7b")                         # plan + run
    model = llmkit.load_decoder(tuned, dtype="float32")     # the torch decoder
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmkit.version import __version__

if TYPE_CHECKING:
    from llmkit import transforms
    from llmkit.api import plan, save
    from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from llmkit.decoder import load_decoder

__all__ = ["Checkpoint", "__version__", "load_decoder", "open_checkpoint", "plan", "save", "transforms"]

_HOMES = {
    "Checkpoint": "llmkit.checkpoint.checkpoint",
    "open_checkpoint": "llmkit.checkpoint.checkpoint",
    "plan": "llmkit.api",
    "save": "llmkit.api",
    "load_decoder": "llmkit.decoder",
}


def __getattr__(name: str) -> Any:
    # Names are looked up on first use: `import llmkit` costs nothing, and torch loads only with what needs it.
    if name == "transforms":
        return import_module("llmkit.transforms")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
