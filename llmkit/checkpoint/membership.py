"""The files of a model, by name: those that readers look for, and those that accompany it."""

from __future__ import annotations

import re
from pathlib import PurePath

from llmkit.formats.folder import is_weight_file
from llmkit.formats.tokenizer_files import TOKENIZER_FILES

# Suffixes whose files some reader takes whatever their stem: weights of every framework, graphs, code, templates.
_MODEL_SUFFIXES = (".onnx", ".onnx_data", ".msgpack", ".h5", ".ckpt", ".npz", ".py", ".jinja", ".model", ".tiktoken")
# Descriptions of the model, of its tokenizer and of its files, whatever program they are for.
_DESCRIBING = re.compile(r"config|token|template|vocab|index|param|merges|processor|special|scales", re.I)
_DESCRIBING_SUFFIXES = (".json", ".yaml", ".yml", ".bin", "")
_ACCOMPANYING = re.compile(
    r"(README|LICENSE|LICENCE|NOTICE|USE_POLICY|MODEL_CARD)(\.\w+)?|\.gitattributes|training_args\.bin|PARITY_FAILED"
    r"|llmkit\.json|model\.onnx\.data",
    re.I,
)
_CUSTOM_CODE = re.compile(r"(modeling|configuration|tokenization|quantization|processing)_\w+\.py")


def decides_what_opens(name: str) -> bool:
    """Whether a file of this name may change which model, tokenizer or prompt a folder opens with.

    Told from what readers look for (weights, their indexes, configs, tokenizers, templates, adapters, graphs, code):
    theirs and those of transformers, peft and ONNX Runtime, which have no closed lists.
    """
    if name.startswith("."):
        return False
    path = PurePath(name)
    if name in TOKENIZER_FILES or is_weight_file(name) or path.suffix in _MODEL_SUFFIXES:
        return True
    return path.suffix in _DESCRIBING_SUFFIXES and _DESCRIBING.search(path.stem) is not None


def belongs_to_model(name: str) -> bool:
    """Whether a file of this name is one of a model's and of nothing else."""
    if name.endswith(".py"):
        return _CUSTOM_CODE.fullmatch(name) is not None
    return decides_what_opens(name) or _ACCOMPANYING.fullmatch(name) is not None
