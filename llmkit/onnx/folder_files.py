"""The small files of an exported folder, as every runtime can read them.

Optimum loads config.json and the tokenizer by transformers' own classes. A model that was published with code of its
own, or whose sizes Optimum does not get from its config, gets the config of the architecture that is the same, or
one that holds for its sizes (Optimum reads no more), beside the original, which llmkit reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.formats.json_text import parse_object
from llmkit.layouts.onnx_folder import ORIGINAL_CONFIG
from llmkit.onnx.stand_in import has_sizes, sizes_only, stand_in
from llmkit.tokenization.without_code import tokenizer_without_code

_TOKENIZER_CONFIG = "tokenizer_config.json"
_LINKED_NBYTES = 1 << 17
# What transformers 5 calls the class; both it and transformers 4 know the second name.
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def runtime_files(ckpt: Checkpoint) -> tuple[dict[str, FileContent], list[str]]:
    """The files by name, and what the user should know of them."""
    files, notes = tokenizer_without_code(ckpt)
    config = dict(ckpt.config)
    described = _known_config(config, ckpt.label)
    if described is not None:
        files[ORIGINAL_CONFIG] = FileContent.of_json(config)
        what = "states sizes as" if "_purpose" in described else "describes the same model as"
        notes.append(
            f"config.json {what} transformers' {described['model_type']} does, for Optimum; {ORIGINAL_CONFIG} is the "
            "model's own"
        )
    files["config.json"] = FileContent.of_json(config if described is None else described)
    if _TOKENIZER_CONFIG in files:
        files[_TOKENIZER_CONFIG] = _readable(files[_TOKENIZER_CONFIG])
    return files, notes


def _known_config(config: dict[str, Any], label: str) -> dict[str, Any] | None:
    """The config for Optimum; None where that is the model's own."""
    architecture = registry.require(config, label)
    same = next(iter(architecture.equivalents.values()), None)
    described = same(config) if same is not None else None
    if described is None and architecture.described_as is not None:
        described = sizes_only(architecture.described_as(config), config)
    if described is None and architecture.reference_config is not None:
        today = dict(architecture.reference_config(config))
        if today.get("model_type") != config.get("model_type"):  # of a release older than transformers' class
            described = today
    dims = architecture.bind(config).dims
    return described if has_sizes(described or config, dims) else stand_in(config, dims)


def _readable(file: FileContent) -> FileContent:
    """tokenizer_config.json with a class that transformers 4 knows, too."""
    settings = parse_object(file.read(), _TOKENIZER_CONFIG)
    stated = settings.get("tokenizer_class")
    if not isinstance(stated, str) or stated not in _CLASSES:
        return file
    return FileContent.of_json({**settings, "tokenizer_class": _CLASSES[stated]})


def large_files(files: Mapping[str, FileContent]) -> dict[str, Path]:
    """Those that go along as they are and are large enough to be shared with the source, like its weights."""
    paths = {name: content.path for name, content in files.items() if content.path is not None}
    return {name: path for name, path in paths.items() if path.is_file() and path.stat().st_size >= _LINKED_NBYTES}
