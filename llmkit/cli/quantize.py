"""`llmkit quantize`: linear layers to integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.options import Calibrating, Grids, ModelArgument, Writing
from llmkit.cli.output import Mode, Output
from llmkit.cli.writing import Addition, write

if TYPE_CHECKING:
    from llmkit.calibration.quantizer import CalibratedQuantizer
    from llmkit.calibration.stored import StoredQuantizer
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.evaluation.divergence import Divergence
    from llmkit.quantization.quality import Meter

__all__ = ["quantize"]

_LARGE_NBYTES = 2**31  # in float32
_N_WORST = 5


@command(
    "llmkit quantize vicuna-7b --bits 4 -o vicuna-7b-int4",
    "llmkit quantize vicuna-7b --bits 8 -o vicuna-7b-int8 --dry-run",
    "llmkit quantize vicuna-7b --bits 4 --group-size 32 --symmetric --keep '*.down_proj' -o out",
    "llmkit quantize vicuna-7b --bits 4 --calibration my.jsonl --samples 256 -o vicuna-7b-mine",
    "llmkit quantize vicuna-7b --bits 4 --calibration none --method rtn -o vicuna-7b-rtn",
    "llmkit quantize vicuna-7b --bits 4 --format gguf -o vicuna-7b-gguf",
    "llmkit quantize vicuna-7b --bits 8 --type fp8 -o vicuna-7b-fp8",
    "llmkit quantize vicuna-7b --bits 4 --format bitsandbytes -o vicuna-7b-nf4",
)
def quantize(
    out: Output,
    model: ModelArgument,
    bits: Annotated[
        int,
        typer.Option(
            "--bits",
            metavar="2|3|4|8",
            autocompletion=completion.among("8", "4", "3", "2"),
            help="Bits of each weight; 5 and 6, too, for --format gguf.",
        ),
    ],
    writing: Writing,
    grids: Grids,
    calibrating: Calibrating,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            autocompletion=completion.quantization_formats,
            help="The layout of what is written; gguf: llama.cpp's preset for these bits (convert --to gguf has all).",
        ),
    ] = "compressed-tensors",
    type: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="int|nf4|fp4|fp8",
            autocompletion=completion.among("int", "nf4", "fp4", "fp8"),
            help="What the bits stand for, where the format has more than integers: fp8 (e4m3, one scale a row, with "
            "--bits 8) in compressed-tensors, nf4 and fp4 (--bits 4) in bitsandbytes.",
            show_default=False,
        ),
    ] = "",
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations",
            metavar="int8",
            autocompletion=completion.among("int8"),
            help="Engines round the inputs of layers to this as they come, too: with --bits 8, W8A8.",
            show_default=False,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            metavar="N",
            min=0,
            help="How long --method signround learns each block (default: 200; 1000 for fewer than 4 bits).",
            show_default=False,
        ),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="Whether --method gptq groups columns by how large their inputs are, and stores the group of each "
            "(desc_act) (default: no).",
            show_default=False,
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--evaluate",
            metavar="FILE|rest",
            help="Then measure, on a text or the rest of the calibration text: perplexity before and after, divergence "
            "from the float model, flipped tokens. Never on windows that calibration read.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Quantize the linear layers of a model to codes of 2 to 8 bits.

    Embeddings, norms, biases and the head stay as they are. The result is in the compressed-tensors layout, which
    transformers and vLLM load unchanged. Fewer than 8 bits are chosen for the inputs that layers have while the model
    reads a text (--calibration). Prints the sizes, bits per weight and the layers with the largest error.
    """
    from llmkit.calibration.quantizer import CalibratedQuantizer
    from llmkit.calibration.ranks import rank
    from llmkit.checkpoint.contents import open_model
    from llmkit.quantization.quality import Meter
    from llmkit.transforms.convert.targets import targets
    from llmkit.transforms.quantize import quantize as quantize_checkpoint

    if rank():
        out = replace(out, mode=Mode.QUIET)
    before = open_model(model, force=writing.force)
    layout = targets().get(format)
    if layout is not None and layout.of_bits:
        if rank():
            return
        _by_presets(out, before, writing, calibrating, bits, format, layout.of_bits, evaluate)
        return
    meter = Meter()
    quantizer = calibrating.quantizer(out, before, grids.method, bits)
    after = quantize_checkpoint(
        before,
        bits=bits,
        iterations=iterations,
        act_order=act_order,
        type=type,
        format=format,
        activations=activations,
        meter=meter,
        quantizer=quantizer,
        **grids.arguments,
    )
    rows = _held_out(before, evaluate, calibrating, quantizer) if evaluate and not writing.dry_run else None
    shared = quantizer if isinstance(quantizer, CalibratedQuantizer) and not writing.dry_run else None
    if rank():
        if shared is not None:
            shared.serve()
        return
    _write(out, before, after, writing, evaluate, rows, meter=meter, quantizer=quantizer)
    if shared is not None:
        shared.ranks.end()


def _by_presets(
    out: Output,
    before: Checkpoint,
    writing: Writing,
    calibrating: Calibrating,
    bits: int,
    format: str,
    of_bits: Mapping[int, Mapping[str, Any]],
    evaluate: str | None,
) -> None:
    """Write a layout that chooses the types of matrices itself, by how sensitive they are known to be."""
    from llmkit.calibration.stored import StoredQuantizer
    from llmkit.errors import InputError
    from llmkit.quantization.codec import alternatives
    from llmkit.transforms.convert import convert

    grids = {"group_size", "symmetric", "type", "keep", "only", "method", "iterations", "act_order", "activations"}
    out.refuse_options(grids, f"--format {format}, whose presets choose types of blocks by matrix")
    if bits not in of_bits:
        raise InputError(f"--bits {bits}: expected {alternatives(sorted(of_bits))}", hint="--bits 4")
    statistics = calibrating.measured(out, before, bits)
    given = {**of_bits[bits], **({"statistics": statistics} if statistics is not None else {})}
    after = convert(before, to=format, **given)
    if evaluate == "rest":
        raise InputError(f"--evaluate rest is not for --format {format}", hint="--evaluate FILE")
    known = StoredQuantizer(before, statistics) if statistics is not None else None
    rows = _held_out(before, evaluate, calibrating, known) if evaluate and not writing.dry_run else None
    _write(out, before, after, writing, evaluate, rows)


def _write(
    out: Output,
    before: Checkpoint,
    after: Checkpoint,
    writing: Writing,
    evaluate: str | None,
    rows: list[list[int]] | None,
    *,
    meter: Meter | None = None,
    quantizer: CalibratedQuantizer | StoredQuantizer | None = None,
) -> None:
    """Write the quantized model, and say what it saved and lost.

    Args:
        rows: windows to measure on afterwards; None for no evaluation.
        meter: of the errors of weights, where they are measured.
        quantizer: what has findings and notes of the run.
    """
    from llmkit.quantization.quality import sizes
    from llmkit.tensors.spec import format_bytes

    saved = sizes(before.tensors, after.tensors)
    size_text = (
        f"{format_bytes(saved.before_nbytes)} → {format_bytes(saved.after_nbytes)} "
        f"({saved.after_nbytes / saved.before_nbytes:.0%}), {saved.bits_per_weight:.2f} bits per weight"
    )
    if meter is not None:
        size_text += f", {saved.linear_bits_per_weight:.2f} in the quantized layers"

    def finish(_manifest: Mapping[str, Any]) -> Addition:
        document: dict[str, Any] = {}
        for note in quantizer.notes() if quantizer is not None else ():
            out.note(note)
        if meter is not None:
            document = {
                "sizes": saved.as_dict(),
                "relative_error": meter.overall() if meter.measured() else None,
                "worst": [{"name": m.name, "relative_error": m.relative_error} for m in meter.worst(_N_WORST)],
                "unmeasured": meter.unmeasured(),
            }
        measured = _evaluated(out, before, writing.output, rows) if rows is not None else None
        if measured is not None:
            document["evaluation"] = {"text": evaluate, **measured.as_dict()}

        def render() -> None:
            out.line(f"size {size_text}")
            if meter is not None:
                _show_errors(out, meter)
            if measured is not None:
                out.line(f"\n{_words(measured)}")

        return document, render

    findings = quantizer.findings if quantizer is not None else None
    write(out, after, writing, details={"size": size_text}, finish=finish, findings=findings)


def _show_errors(out: Output, meter: Meter) -> None:
    n_measured, n_unmeasured = len(meter.measured()), len(meter.unmeasured())
    if n_measured:
        out.line(f"relative error {meter.overall():.4f} over {n_measured} layers; the largest:\n")
        rows = [(m.name, f"{m.relative_error:.4f}") for m in meter.worst(_N_WORST)]
        out.table(["tensor", "relative error"], rows, right=["relative error"])
    if n_unmeasured:
        out.line(f"{n_unmeasured} layers were written by the interrupted run; their error was not measured")


def _words(found: Divergence) -> str:
    return (
        f"perplexity {found.before.perplexity:.3f} → {found.after.perplexity:.3f}, divergence {found.kl:.4f} nats, "
        f"{found.flipped:.1%} of {found.after.n_scored} likeliest tokens are others"
    )


def _held_out(
    ckpt: Checkpoint, evaluate: str, calibrating: Calibrating, quantizer: CalibratedQuantizer | StoredQuantizer | None
) -> list[list[int]]:
    """The windows to measure on, before any work.

    Raises:
        InputError: no such text, or nothing of it is left.
    """
    from llmkit.calibration.held_out import held_out
    from llmkit.calibration.quantizer import CalibratedQuantizer
    from llmkit.calibration.samples import Samples
    from llmkit.calibration.texts import read_text
    from llmkit.errors import InputError

    if evaluate != "rest":
        samples = Samples(read_text(Path(evaluate)), length=calibrating.length)
    elif isinstance(quantizer, CalibratedQuantizer) and quantizer.samples.text is not None:
        samples = quantizer.samples
    else:
        raise InputError("--evaluate rest: there is no text that calibration reads", hint="--evaluate FILE")
    return held_out(ckpt, samples, quantizer.read_of(samples.text) if quantizer is not None else None)


def _evaluated(out: Output, before: Checkpoint, folder: Path, rows: list[list[int]]) -> Divergence:
    """The float model and the quantized one over the same windows; large models one layer at a time."""
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.decoder.load import load_decoder
    from llmkit.evaluation.divergence import measure_divergence

    is_large = sum(4 * lazy.spec.numel for lazy in before.tensors.values()) > _LARGE_NBYTES
    floats, quantized = (load_decoder(ckpt, streamed=is_large) for ckpt in (before, open_checkpoint(folder)))
    ids = [i for row in rows for i in row]
    return measure_divergence(floats, quantized, ids, context=len(rows[0]), progress=out.progress())
