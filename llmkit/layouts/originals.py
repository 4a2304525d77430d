"""The spellings that families' own code published their weights in, as plugins declare them (`Original`)."""

from __future__ import annotations

from llmkit.architecture.registry import default_registry
from llmkit.errors import InputError, PluginError, SpecError
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.layout import Opened, Spelling, commonest_dtype, to_hf

__all__ = ["find"]


def find(candidate: Candidate) -> Opened | None:
    """What a weight file without a config.json holds, where a plugin knows its names; None otherwise.

    Raises:
        InputError: the plugin knows the names, and the tensors are not its model's.
    """
    if candidate.main is None or "config.json" in candidate.names:
        return None
    shapes = {name: lazy.shape for name, lazy in candidate.tensors.items()}
    for found in default_registry().load_all().values():
        for original in () if isinstance(found, PluginError) else found.originals:
            if not all(mark in shapes for mark in original.marks):
                continue
            where = str(candidate.main)
            try:
                config = original.config(shapes)
            except SpecError as error:
                raise InputError(f"{where}: {error.message}", hint=error.hint) from error
            config["torch_dtype"] = commonest_dtype(candidate.tensors).torch_name
            tensors = to_hf(where, candidate.tensors, config, Spelling(original.names))
            return Opened(original.name, tensors, config, notes=(f"read from {original.name}",))
    return None
