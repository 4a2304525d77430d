"""Adapters as files: PEFT folders in every saved form, and the files of other trainers.

Reading an adapter reads its header and config only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmkit.formats import adapter_mlx, adapter_other
from llmkit.formats.adapter import Adapter, from_peft
from llmkit.formats.adapter_files import CONFIG_NAME, find_weights, read_tensors
from llmkit.formats.json_text import read_object
from llmkit.formats.unreadable import refuse_no_files


def read_adapter(path: Path, *, alpha: float | None = None, force: bool = False) -> Adapter:
    """Read an adapter: a PEFT folder, or a weight file with its config beside it.

    Args:
        alpha: the scaling numerator of a file that has no config (LoRA files of lit-llama).
        force: take on trust that the base is the changed one an adapter needs.

    Raises:
        InputError: no adapter there, one without tensors, or malformed files.
        RequirementError: an adapter that no merged weights can express, named.
    """
    file, notes = find_weights(path)
    folder = file.parent
    tensors = read_tensors(file)
    label = folder.name if path.is_dir() else f"{folder.name}/{file.name}"
    refuse_no_files(folder, [CONFIG_NAME])
    config_path = folder / CONFIG_NAME
    config = read_object(config_path) if config_path.is_file() else {}
    if adapter_mlx.is_mlx(config, tensors):
        adapter = adapter_mlx.from_mlx(label, config, tensors, folder=folder)
    elif config_path.is_file():
        adapter = from_peft(label, config, tensors, folder=folder, force=force)
    else:
        adapter = adapter_other.read(file, tensors, label, alpha=alpha, force=force)
    return replace(adapter, notes=(*notes, *adapter.notes)) if notes else adapter
