"""What a checkpoint can be converted to: one entry for each layout.

A target gets a float (or, where it says so, any) checkpoint as transformers lays it out, and gives one whose tensors,
config, files and container are those of the layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint, FileContent
from llmkit.checkpoint.text_part import text_part
from llmkit.formats.container import Container, SafetensorsFiles
from llmkit.formats.torch_zip import TorchFiles
from llmkit.layouts import litgpt, llama2c, meta
from llmkit.layouts.layout import Written
from llmkit.tokenization.parity import compare, tied_texts
from llmkit.tokenization.scored_pieces import from_scored_pieces, to_scored_pieces
from llmkit.tokenization.sentencepiece_model import SentencePieceModel
from llmkit.transforms.convert import gguf

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
        counts_overflow: `write` chooses dtypes itself (`--dtype` does not apply), and counts what they cannot hold.
    """

    summary: str
    write: Write
    options: tuple[str, ...] = ()
    takes_quantized: bool = False
    counts_overflow: bool = False


def _contained(container: Container) -> Write:
    """The names and config of transformers, in another container."""
    return lambda ckpt: ckpt.derive(container=container)


def _foreign(write: Callable[..., Written]) -> Write:
    """A layout of its own; the config goes along as a file for what its description of the model does not state."""

    def changed(ckpt: Checkpoint, **options: Any) -> Checkpoint:
        ckpt = text_part(ckpt)
        written = write(ckpt.tensors, ckpt.config, **options)
        unread = ckpt.require_model().unread
        config = (json.dumps(dict(ckpt.config), indent=2, ensure_ascii=False) + "\n").encode()
        files = {**ckpt.files, "config.json": FileContent(data=config)}
        files |= {name: FileContent(data=data) for name, data in written.files.items()}
        return ckpt.derive(
            tensors=written.tensors,
            config={},
            files=files,
            container=written.container,
            notes=written.notes,
            warnings=unread.warnings,
        )

    return changed


def _with_pieces(ckpt: Checkpoint, **options: Any) -> Checkpoint:
    """llama2.c's layout, with its tokenizer.bin where the tokenizer is a SentencePiece model."""
    written = _foreign(llama2c.write)(ckpt, **options)
    model = ckpt.files.get("tokenizer.model")
    if model is None:
        return written.derive(notes=["no tokenizer.bin: it is made of a SentencePiece model, tokenizer.model"])
    sp = SentencePieceModel.parse(model.read(), f"{ckpt.label}: tokenizer.model")

    def check(made: bytes) -> str | None:
        read = from_scored_pieces(made, len(sp.pieces), "tokenizer.bin")
        found = compare(sp.encoder(), read.encoder(), more=tied_texts(sp.scores))
        return None if found is None else f"llama2.c cuts text by tokenizer.bin otherwise than tokenizer.model: {found}"

    pieces = FileContent(data=to_scored_pieces(sp), check=check)
    return written.derive(files={**written.files, "tokenizer.bin": pieces})


TARGETS: dict[str, Target] = {
    "hf": Target("safetensors, as transformers writes them", _contained(SafetensorsFiles()), takes_quantized=True),
    "bin": Target("PyTorch's zip files (pytorch_model.bin)", _contained(TorchFiles()), takes_quantized=True),
    "gguf": Target("GGUF, as llama.cpp reads it", gguf.write, ("type",), counts_overflow=True),
    "meta": Target("Meta's consolidated.NN.pth and params.json", _foreign(meta.write), ("model_parallel",)),
    "litgpt": Target("litgpt's lit_model.pth and model_config.yaml", _foreign(litgpt.write)),
    "llama2c": Target("llama2.c's model.bin and tokenizer.bin", _with_pieces, ("file_version",)),
}
