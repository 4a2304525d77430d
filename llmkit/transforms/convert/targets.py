"""What a checkpoint can be converted to: one entry for each layout.

A target gets a float (or, where it says so, any) checkpoint as transformers lays it out, and gives one whose tensors,
config, files and container are those of the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.text_part import text_part
from llmkit.formats.container import Container, SafetensorsFiles
from llmkit.formats.torch_zip import TorchFiles
from llmkit.layouts.layout import Layout
from llmkit.layouts.opening import layouts
from llmkit.quantization.codec import FolderCodec, folder_readers
from llmkit.tokenization.parity import compare, tied_texts
from llmkit.tokenization.scored_pieces import from_scored_pieces, to_scored_pieces
from llmkit.tokenization.sentencepiece_model import SentencePieceModel
from llmkit.transforms.candidates import Candidates
from llmkit.transforms.convert import gguf
from llmkit.transforms.convert.codes import to_codec
from llmkit.transforms.convert.gguf_recipe import as_filed, block_candidates
from llmkit.transforms.recipe import Recipe

Write = Callable[..., Checkpoint]


@dataclass(frozen=True, slots=True)
class Target:
    """A layout that can be written.

    Attributes:
        summary: what it is, in a few words, for help.
        write: the checkpoint in this layout; `options` are its keyword arguments.
        options: names of the options it takes.
        takes_quantized: whether a quantized checkpoint goes there as it is.
        of_bits: for layouts of blocks, whose types `write` chooses by tensor, its options for `quantize --bits`.
        as_filed: the checkpoint with the matrices that files have apart.
        candidates: for these, how each matrix can be stored (float tensors, the same written in floats, a recipe).
        counts_overflow: `write` chooses dtypes itself (`--dtype` does not apply), and counts what they cannot hold.
    """

    summary: str
    write: Write
    options: tuple[str, ...] = ()
    takes_quantized: bool = False
    counts_overflow: bool = False
    of_bits: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    as_filed: Callable[[Checkpoint], Checkpoint] = lambda ckpt: ckpt
    candidates: Callable[[Checkpoint, Checkpoint, Recipe], Candidates] | None = None


def _contained(container: Container) -> Write:
    """The names and config of transformers, in another container."""
    return lambda ckpt: ckpt.derive(container=container)


def _foreign(layout: Layout) -> Write:
    """A layout of its own; the config goes along as a file for what its description of the model does not state."""

    def changed(ckpt: Checkpoint, **options: Any) -> Checkpoint:
        ckpt = text_part(ckpt)
        assert layout.write is not None  # noqa: S101 - `targets` takes those that have one
        written = layout.write(ckpt.tensors, ckpt.config, **options)
        files = {**ckpt.files, "config.json": FileContent.of_json(dict(ckpt.config))}
        files |= {name: FileContent(data=data) for name, data in written.files.items()}
        notes = list(written.notes)
        if layout.pieces is not None:
            pieces = _scored_pieces(ckpt, layout.pieces, layout.name)
            files |= {} if pieces is None else {layout.pieces: pieces}
            if pieces is None:
                notes.append(f"no {layout.pieces}: it is made of a SentencePiece model, tokenizer.model")
        return ckpt.derive(
            tensors=written.tensors,
            config={},
            files=files,
            container=written.container,
            notes=notes,
            warnings=ckpt.require_model().unread.warnings,
        )

    return changed


def _scored_pieces(ckpt: Checkpoint, name: str, layout: str) -> FileContent | None:
    """A file of scored pieces made from the SentencePiece model; None where there is none."""
    if "tokenizer.model" not in ckpt.files:
        return None
    sp = SentencePieceModel.parse(ckpt.files["tokenizer.model"].read(), f"{ckpt.label}: tokenizer.model")

    def check(content: bytes) -> str | None:
        read = from_scored_pieces(content, len(sp.pieces), name)
        difference = compare(sp.encoder(), read.encoder(), more=tied_texts(sp.scores))
        return (
            None if difference is None else f"{layout} cuts text by {name} otherwise than tokenizer.model: {difference}"
        )

    return FileContent(data=to_scored_pieces(sp), check=check)


_BUILT_IN = {
    "hf": Target("safetensors, as transformers writes them", _contained(SafetensorsFiles()), takes_quantized=True),
    "bin": Target("PyTorch's zip files (pytorch_model.bin)", _contained(TorchFiles()), takes_quantized=True),
    "dense": Target("safetensors in floats", _contained(SafetensorsFiles())),
    "gguf": Target(
        "GGUF, as llama.cpp reads it",
        gguf.write,
        ("type", "statistics", "requantize", "recipe"),
        takes_quantized=True,
        counts_overflow=True,
        of_bits=gguf.OF_BITS,
        as_filed=as_filed,
        candidates=block_candidates,
    ),
}


def targets() -> dict[str, Target]:
    """What can be written, by the name that `--to` takes: transformers' own files, GGUF, and registered layouts."""
    written = [layout for layout in layouts() if layout.write is not None]
    codecs = [reader for reader in folder_readers() if isinstance(reader, FolderCodec)]
    words = "quantized, code for code"
    coded = {c.name: Target(words, to_codec(c), ("requantize",), takes_quantized=True) for c in codecs}
    foreign = {layout.name: Target(layout.summary, _foreign(layout), layout.options) for layout in written}
    return _BUILT_IN | coded | foreign
