"""`llmkit quantize observe`: what the inputs of a model's layers are like, in a file."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkit.cli.command import command
from llmkit.cli.grid_options import TextOptions
from llmkit.cli.options import ModelArgument, WriteOptions
from llmkit.cli.output import Output
from llmkit.cli.writing import write


@command(
    "llmkit quantize observe vicuna-7b --calibration my.txt -o statistics.safetensors",
    "llmkit quantize observe vicuna-7b --calibration my.txt -o imatrix.gguf",
    name="quantize observe",
)
def observe(
    out: Output,
    model: ModelArgument,
    writing: WriteOptions,
    calibrating: TextOptions,
    moments: Annotated[
        bool, typer.Option("--moments", help="Keep second moments, too, which gptq needs: [in, in] for each weight.")
    ] = False,
) -> None:
    """Keep statistics of the inputs of all layers in a file, for quantize --statistics.

    The model reads --calibration, or the text that llmkit brings. OUT is one file: .safetensors, or an importance
    matrix of llama.cpp (.gguf, or .dat for its form before 2025). Quantization can then be tried with other settings
    without another pass over the text; the statistics are those of the float model.
    """
    from llmkit.calibration.observe import observe as observed
    from llmkit.checkpoint.checkpoint import open_checkpoint

    ckpt = open_checkpoint(model)
    made = observed(ckpt, calibrating.windows(), writing.output.name, has_moments=moments, device=calibrating.where)
    write(out, made, writing, hint=f"llmkit quantize {model} --bits 4 --statistics {{out}} -o OUT")
