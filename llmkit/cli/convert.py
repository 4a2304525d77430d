"""`llmkit convert`: another file layout, another float dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.options import ModelArgument, OutDtypeOption, WriteOptions
from llmkit.cli.output import Output
from llmkit.cli.writing import Addition, write
from llmkit.errors import counted

_N_WORST = 5


@command(
    "llmkit convert vicuna-7b --to bin -o vicuna-7b-bin",
    "llmkit convert vicuna-7b-bin --to hf --dtype float16 -o vicuna-7b",
    "llmkit convert chatglm3-6b --to hf --as glm -o chatglm3-6b-glm",
    "llmkit convert vicuna-7b --to gguf --type q4_k_m -o vicuna-7b-gguf",
    "llmkit convert vicuna-7b-gptq --to compressed-tensors -o vicuna-7b-packed",
)
def convert(
    out: Output,
    model: ModelArgument,
    to: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT",
            autocompletion=completion.layouts,
            help="hf: safetensors. bin: PyTorch's pytorch_model.bin. meta: consolidated.NN.pth with params.json. "
            "litgpt: lit_model.pth with model_config.yaml. llama2c: model.bin and tokenizer.bin. "
            "gguf: one file for llama.cpp. Meta's, litgpt's and llama2.c's hold what computes as Llama does. "
            "dense: safetensors in floats. A quantized model, code for code: compressed-tensors, gptq, gptq_v2, awq, "
            "bitsandbytes, bitsandbytes_nested. ",
        ),
    ],
    writing: WriteOptions,
    dtype: OutDtypeOption = None,
    model_parallel: Annotated[
        int | None, typer.Option(metavar="N", help="With --to meta: the number of files (default: 1).")
    ] = None,
    file_version: Annotated[
        int | None, typer.Option(metavar="N", help="With --to llama2c: 0, 1 (default) or 2 (int8).")
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            autocompletion=completion.gguf_types,
            help="With --to gguf: f32, f16, bf16, or a preset of llama.cpp: q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs, "
            "q3_k_m, q2_k and others (default: f16, and quantized matrices as they are where blocks hold them).",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --to gguf: what was measured of the inputs of its matrices (an importance matrix of "
            "llama.cpp, or a file of llmkit's): errors of columns with large inputs count more.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --to gguf: types of single matrices, as YAML: globs, each with a type (q6_k), bits, or float; "
            "the first that matches counts.",
        ),
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what the grid of another quantized layout cannot hold.")
    ] = False,
    architecture: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="NAME",
            autocompletion=completion.plugins,
            help="Store it as another architecture that computes the same, such as glm (ChatGLM2, ChatGLM3, GLM-4) or "
            "llama (Baichuan 7B); `llmkit plugins show` names them.",
        ),
    ] = None,
) -> None:
    """Write a model in another file layout or float dtype.

    Every layout that opens can be converted. Tokenizer and other files go along. Values that the new dtype cannot
    hold become infinite; they are counted and named.
    """
    from llmkit.checkpoint.classification import open_model
    from llmkit.checkpoint.statistics import open_statistics
    from llmkit.transforms.convert import Overflow
    from llmkit.transforms.convert import convert as convert_checkpoint
    from llmkit.transforms.recipe import read_recipe

    overflow = Overflow()
    stated: dict[str, Any] = {"model_parallel": model_parallel, "file_version": file_version}
    ckpt = open_model(model, force=writing.force)
    stated |= {"type": type_, "statistics": open_statistics(statistics, ckpt) if statistics is not None else None}
    stated |= {"requantize": requantize or None, "recipe": read_recipe(recipe) if recipe is not None else None}
    options = {name: value for name, value in stated.items() if value is not None}
    after = convert_checkpoint(ckpt, to=to, dtype=dtype, architecture=architecture, overflow=overflow, **options)

    def finish(_manifest: Mapping[str, Any]) -> Addition:
        counts = overflow.by_tensor()
        if counts:
            out.warning(_overflow_text(counts, None if dtype is None else str(dtype), type_ or "f16"))
        uncounted = overflow.uncounted()
        if uncounted:
            out.note(f"overflow not counted: {counted(len(uncounted), 'tensor')} that the interrupted run had written")
        return overflow.as_dict(), lambda: None

    write(out, after, writing, finish=finish, findings=overflow.as_dict)


def _overflow_text(counts: Mapping[str, int], dtype: str | None, type_: str) -> str:
    """How many values do not fit the dtype (None: the type of a GGUF file), and which one they would."""
    worst = ", ".join(f"{name} ({n})" for name, n in list(counts.items())[:_N_WORST])
    more = f" and {len(counts) - _N_WORST} more" if len(counts) > _N_WORST else ""
    total = sum(counts.values())
    values = "1 value became" if total == 1 else f"{total} values became"
    tensors = counted(len(counts), "tensor")
    wider = f"--type {'bf16' if type_ == 'f16' else 'f32'}"
    if dtype is not None:
        wider = f"--dtype {'bfloat16' if dtype == 'float16' else 'float32'}"
    return f"{values} infinite in {dtype or type_}, in {tensors}: {worst}{more}; {wider} holds larger ones"
