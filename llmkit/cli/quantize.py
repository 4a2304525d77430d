"""`llmkit quantize`: linear layers to integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.options import Calibrating, Grids, ModelArgument, Writing
from llmkit.cli.output import Output
from llmkit.cli.writing import Addition, write

__all__ = ["quantize"]


@command(
    "llmkit quantize vicuna-7b --bits 4 -o vicuna-7b-int4",
    "llmkit quantize vicuna-7b --bits 8 -o vicuna-7b-int8 --dry-run",
    "llmkit quantize vicuna-7b --bits 4 --group-size 32 --symmetric --keep '*.down_proj' -o out",
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
            help="Bits of each weight.",
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
            help="The layout of what is written.",
        ),
    ] = "compressed-tensors",
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
) -> None:
    """Quantize the linear layers of a model to integers of 2 to 8 bits.

    Embeddings, norms, biases and the head stay as they are. The result is in the compressed-tensors layout, which
    transformers and vLLM load unchanged. Prints the sizes, bits per weight and the layers with the largest error.
    """
    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.quantization.quality import Meter, sizes
    from llmkit.tensors.spec import format_bytes
    from llmkit.transforms.quantize import quantize as quantize_checkpoint

    before = open_checkpoint(model)
    meter = Meter()
    quantizer = calibrating.quantizer(out, before)
    chosen = {**grids.arguments, "method": grids.method or ("gptq" if quantizer is not None else "rtn")}
    after = quantize_checkpoint(
        before, bits=bits, iterations=iterations, format=format, meter=meter, quantizer=quantizer, **chosen
    )
    saved = sizes(before.tensors, after.tensors)
    size_text = (
        f"{format_bytes(saved.before_nbytes)} → {format_bytes(saved.after_nbytes)} "
        f"({saved.after_nbytes / saved.before_nbytes:.0%}), {saved.bits_per_weight:.2f} bits per weight, "
        f"{saved.linear_bits_per_weight:.2f} in the quantized layers"
    )

    def finish(_manifest: Mapping[str, Any]) -> Addition:
        worst = meter.worst(5)
        n_measured, n_unmeasured = len(meter.measured()), len(meter.unmeasured())
        document = {
            "sizes": saved.as_dict(),
            "relative_error": meter.overall() if n_measured else None,
            "worst": [{"name": m.name, "relative_error": m.relative_error} for m in worst],
            "unmeasured": meter.unmeasured(),
        }

        def render() -> None:
            out.line(f"size {size_text}")
            if n_measured:
                out.line(f"relative error {meter.overall():.4f} over {n_measured} layers; the largest:\n")
                rows = [(m.name, f"{m.relative_error:.4f}") for m in worst]
                out.table(["tensor", "relative error"], rows, right=["relative error"])
            if n_unmeasured:
                out.line(f"{n_unmeasured} layers were written by the interrupted run; their error was not measured")

        return document, render

    write(out, after, writing, details={"size": size_text}, finish=finish)
