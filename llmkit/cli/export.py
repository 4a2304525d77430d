"""`llmkit export`: a folder that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.grid_options import GridOptions
from llmkit.cli.options import DtypeOption, ModelArgument, WriteOptions
from llmkit.cli.output import Output
from llmkit.cli.parity import refuse_difference, show_parity
from llmkit.cli.writing import Addition, write
from llmkit.errors import InputError, RequirementError, nearest

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.onnx.parity import ParityReport
    from llmkit.onnx.precision import Precision

_NEXT = "llmkit generate {out} PROMPT"


@dataclass(frozen=True, kw_only=True)
class GraphGridOptions(GridOptions):
    """The options of grids in a graph."""

    embedding_bits: Annotated[
        int | None,
        typer.Option(
            metavar="4|8|16",
            help="Bits of the embedding and the head, which share bytes where they are tied; 16 leaves them in floats "
            "(default: 8 with --bits).",
        ),
    ] = None
    qdq: Annotated[
        bool,
        typer.Option(
            "--qdq",
            help="Write DequantizeLinear and MatMul, which every runtime reads, in place of MatMulNBits, to which ONNX "
            "Runtime fuses them.",
        ),
    ] = False
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            metavar="0|1|4",
            help="What products with integers are computed in: 4 is int8 (the default on the CPU, and several times as "
            "fast), 1 float32, 0 as the compute dtype.",
        ),
    ] = None

    def precision(self, bits: int | None) -> Precision:
        """The same with the bits of linear layers."""
        from llmkit.onnx.precision import Precision

        return Precision(
            bits,
            embedding_bits=self.embedding_bits,
            accuracy_level=self.accuracy_level,
            is_qdq=self.qdq,
            **self.arguments,
        )


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The options of the cache in a graph."""

    title: ClassVar = "Cache of keys and values"
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="Keep keys and values in int8: a quarter of the memory, faster steps at long contexts, slower prompts "
            "(default: the compute dtype).",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            "--calibrate",  # as it was called once
            metavar="FILE",
            help="A text whose first 2048 tokens tell the ranges of keys and values (default: the checkpoint's own "
            "scales, or a text that llmkit brings).",
        ),
    ] = None


@command(
    "llmkit export vicuna-7b --to onnx -o vicuna-7b-onnx",
    "llmkit export vicuna-7b --to onnx --bits 4 -o vicuna-7b-onnx-int4",
    "llmkit export vicuna-7b --to onnx --bits 4 --embedding-bits 4 --keep '*.down_proj' -o out",
    "llmkit export vicuna-7b --to onnx --weights copy --attention attention -o out",
    "llmkit export vicuna-7b --to onnx --kv-cache-dtype int8 --calibration chats.txt -o out",
)
def export(
    out: Output,
    model: ModelArgument,
    writing: WriteOptions,
    grids: GraphGridOptions,
    cache: CacheOptions,
    to: Annotated[str, typer.Option(metavar="onnx", help="The format to export to.")] = "onnx",
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="4|8",
            help="Quantize the linear layers to so many bits (default: floats). Layers that are quantized already keep "
            "their grid, unless it has more bits.",
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="gqa|flash|attention|mha",
            autocompletion=completion.attentions,
            help="The op that computes attention (default: the fastest that can). flash is gqa without a mask that is "
            "added to scores, as CUDA's flash kernels want it: batches are padded on the right. With gqa and flash, "
            "ONNX Runtime takes a batch of several rows in one call for the whole prompt, then one token a call; "
            "attention takes a prompt in several calls.",
        ),
    ] = None,
    provider: Annotated[
        str, typer.Option(metavar="cpu|cuda", autocompletion=completion.providers, help="What the graph shall run on.")
    ] = "cpu",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="link|copy",
            help="link: the graph refers to the model's own files, which OUT shares (reflinks where the disk can, else "
            "hard links). copy: OUT has weights of its own (onnx.checker refuses hard links, runtimes take them). "
            "Default: link for files of which most is used, copy for the rest.",
        ),
    ] = None,
    via: Annotated[
        str | None,
        typer.Option(metavar="optimum", help="Let Optimum trace transformers' model: where no plugin describes it."),
    ] = None,
    no_check: Annotated[
        bool,
        typer.Option(
            "--no-check",
            help="Neither compare the folder's logits with the torch decoder's, nor read what is linked to hash it for "
            "verify.",
        ),
    ] = False,
) -> None:
    """Export a model to ONNX, built from its architecture: fused attention, weights left in the files they are in.

    The folder runs in ONNX Runtime through llmkit (generate, eval, perplexity take it), in ONNX Runtime GenAI and in
    Optimum. Afterwards its logits are compared with the torch decoder's; exit code 1 when they differ. A quantized
    graph is compared with the torch decoder of the same integers, a cache in int8 with one that rounds alike.
    """
    from llmkit.checkpoint.classification import open_model, require_model
    from llmkit.checkpoint.quantized import refuse_unread
    from llmkit.onnx.export import computed_weights
    from llmkit.onnx.export import export as export_checkpoint

    _refuse_other(to)
    ckpt = require_model(open_model(model, force=writing.force), "export")
    refuse_unread(ckpt)
    if via is not None:
        from llmkit.cli.export_via import export_via

        export_via(out, ckpt, writing, via, check=not no_check)
        return
    _described(ckpt)
    if not (no_check or writing.dry_run):
        _runtime()
    precision = grids.precision(bits)
    after = export_checkpoint(
        ckpt,
        weights=weights,  # type: ignore[arg-type]
        dtype=dtype,
        attention=attention,  # type: ignore[arg-type]
        precision=precision,
        provider=provider,
        kv_cache_dtype=cache.kv_cache_dtype,
        calibration=cache.calibration,
    )
    reference = partial(computed_weights, ckpt, dtype=dtype, precision=precision, provider=provider)
    check = None if no_check else _Check(out, writing.output, reference, dtype, provider)
    planned = "none (--no-check)" if check is None else "against the torch decoder, which holds the whole model"
    finish = _unchecked if check is None else check.finish
    write(out, after, writing, details={"check": planned}, finish=finish, hash_links=not no_check, hint=_NEXT)
    if check is not None and check.found is not None:
        refuse_difference(out, writing.output, check.found, "the torch decoder")


def _refuse_other(to: str) -> None:
    """Refuse every format but ONNX, with the command that writes it."""
    if to != "onnx":
        from llmkit.transforms.convert.targets import targets

        converted = f"llmkit convert MODEL --to {to} -o OUT" if to in targets() else "--to onnx"
        hint = "did you mean onnx?" if nearest(to, ["onnx"]) else converted
        raise InputError(f"--to {to!r} is no format that llmkit exports; expected onnx", hint=hint)


def _unchecked(_manifest: Mapping[str, Any]) -> Addition:
    return {"parity": None}, lambda: None


@dataclass
class _Check:
    """The comparison of a written folder with the torch decoder.

    Attributes:
        reference: makes the weights that the graph computes with.
        found: what was compared; None before, and where the provider is not here.
    """

    out: Output
    folder: Path
    reference: Callable[[], Checkpoint]
    dtype: str
    provider: str
    found: ParityReport | None = None

    def finish(self, _manifest: Mapping[str, Any]) -> Addition:
        from llmkit.onnx.parity import check_folder, has_provider

        # Only bfloat16 needs the provider that it is for: the CPU computes everything else.
        runner = self.provider if self.dtype == "bfloat16" else "cpu"
        if runner != "cpu" and not has_provider(runner):
            why = f"not compared with the torch decoder: ONNX Runtime has no provider {runner!r} here"
            return {"parity": None, "unchecked": why}, lambda: self.out.warning(why)
        reference = self.reference()
        self.out.doing("comparing with the torch decoder")
        found = self.found = check_folder(self.folder, reference, dtype=self.dtype, provider=runner)
        return found.as_dict(), lambda: show_parity(self.out, found, "the torch decoder")


def _described(ckpt: Checkpoint) -> None:
    """Refuse what no plugin describes, with the way out."""
    from llmkit.architecture import registry

    if not ckpt.config:
        raise RequirementError(
            f"{ckpt.label} has no config.json, which says what model it is",
            hint="copy the config.json and the tokenizer that it was published with beside the weights",
        )
    try:
        registry.require(dict(ckpt.config), ckpt.label)
    except RequirementError as error:
        hint = "--via optimum traces the class of transformers (pip install 'llmkit[cpu,optimum]')"
        raise RequirementError(error.message, hint=hint) from error


def _runtime() -> None:
    """Say before the work that the check after it needs ONNX Runtime."""
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        raise RequirementError(
            "ONNX Runtime, which checks the export, is not installed",
            hint="pip install 'llmkit[cpu]' (or llmkit[gpu]; never both), or --no-check",
        )
