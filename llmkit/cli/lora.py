"""`llmkit lora merge|combine|extract`: adapters into weights, into each other, and out of a tuned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.options import OutDtypeOption, SeedOption, WriteOptions
from llmkit.cli.output import Output
from llmkit.cli.writing import Addition, write
from llmkit.errors import InputError, counted

if TYPE_CHECKING:
    from llmkit.quantization.quality import Meter

AdaptersArgument = Annotated[
    list[str], typer.Argument(metavar="ADAPTER…", help="Adapter folders or files, in the order they are taken.")
]
WeightOption = Annotated[
    list[float] | None,
    typer.Option("--weight", metavar="W", help="A factor for each adapter, in their order (default: 1 for each)."),
]


@command(
    "llmkit lora merge llama-7b alpaca-lora-7b -o alpaca-7b",
    "llmkit lora merge llama-7b chinese-llama-plus-lora-7b chinese-alpaca-plus-lora-7b -o chinese-alpaca-plus-7b",
    "llmkit lora merge base style-lora --weight 0.5 -o out --dry-run",
)
def merge(
    out: Output,
    base: Annotated[str, typer.Argument(metavar="BASE", help="The float model that the adapter was trained on.")],
    adapters: AdaptersArgument,
    writing: WriteOptions,
    weight: WeightOption = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="A", help="The alpha of a LoRA file that has no config (lit-llama).")
    ] = None,
    dtype: OutDtypeOption = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Merge into a quantized base: what the adapter changes is rounded to its grid again, the rest stays.",
        ),
    ] = False,
) -> None:
    """Merge adapters into a base, one after the other: LoRA, DoRA, IA3, AdaLoRA, LoHa, LoKr, saved modules and tokens.

    An adapter that brings a larger vocabulary resizes embedding, head, config and tokenizer in the same step. Every
    tensor of the adapter is used, or it is an error. The weights are those of peft's merge_and_unload, bit for bit;
    with --dtype the base is cast before anything is added. Prints how many modules changed, and how much: the norm of
    the change by that of the weight.
    """
    from llmkit.checkpoint.classification import open_model, require_model
    from llmkit.formats.adapter_files import CONFIG_NAME
    from llmkit.quantization.quality import Meter
    from llmkit.transforms import lora

    model = require_model(open_model(base, force=writing.force), "lora merge")
    opened = [lora.open_adapter(a, alpha=alpha, force=writing.force) for a in adapters]
    if alpha is not None and all(a.folder is not None and (a.folder / CONFIG_NAME).is_file() for a in opened):
        raise InputError(
            f"--alpha is for a LoRA file without a config, and {opened[0].label} has {CONFIG_NAME}",
            hint="leave --alpha out; --weight W multiplies an update",
        )
    meter = Meter()
    options: dict[str, Any] = {"weights": weight, "dtype": dtype, "force": writing.force, "requantize": requantize}
    merged = lora.merge(model, opened, meter=meter, **options)
    write(out, merged, writing, finish=_measured(out, meter, "change", "changed"))


@command(
    "llmkit lora combine math-lora code-lora -o both",
    "llmkit lora combine a b --method svd --rank 16 --weight 0.7 --weight 0.3 -o mixed",
    "llmkit lora combine a b c --method ties --density 0.2 -o merged",
)
def combine(
    out: Output,
    adapters: AdaptersArgument,
    writing: WriteOptions,
    method: Annotated[
        str,
        typer.Option(
            metavar="M",
            autocompletion=completion.methods,
            help="cat (the exact sum), svd, linear, ties, dare_linear, dare_ties or magnitude_prune.",
        ),
    ] = "cat",
    weight: WeightOption = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="D", help="Share of elements that ties, dare_… and magnitude_prune keep, 0 to 1; they need it."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", min=1, help="Rank of the result of svd (default: the largest of the adapters)."),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Combine LoRA adapters into one adapter, which peft and `llmkit lora merge` read.

    cat is the exact sum of the updates, at the sum of the ranks. svd is the nearest to it at a given rank, and says how
    much of the sum is lost in which layer. The others
    work on the factors elementwise, as in peft, and are approximations.
    """
    from llmkit.quantization.quality import Meter
    from llmkit.transforms import lora

    lora.require_method(method)
    # Files that state no alpha are refused for their names.
    opened = [lora.open_adapter(a, alpha=1.0, force=writing.force) for a in adapters]
    meter = Meter()
    adapter = lora.combine(opened, method=method, weights=weight, density=density, rank=rank, seed=seed, meter=meter)
    write(
        out, adapter, writing, finish=_measured(out, meter, "relative error", "combined") if method == "svd" else None
    )


@command(
    "llmkit lora extract llama-7b my-tuned-7b --rank 32 -o my-lora",
    "llmkit lora extract llama-7b my-tuned-7b --energy 0.9 -o my-lora",
)
def extract(
    out: Output,
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that was tuned.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="What it became.")],
    writing: WriteOptions,
    rank: Annotated[int | None, typer.Option(metavar="R", min=1, help="The rank of every layer; or --energy.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="E", help="Give each layer the rank that keeps this share of the difference."),
    ] = None,
) -> None:
    """Extract a LoRA adapter from a fully tuned model; prints how near it is, layer by layer.

    Both models are read once before the plan is made (also with --dry-run): which tensors differ, and with --energy how
    large the ranks are, follows from the data. What was compared is kept in OUT.survey until OUT is written: the same
    command goes on there after an interruption.
    """
    from llmkit.checkpoint.classification import open_model
    from llmkit.cli.survey import SurveyStage
    from llmkit.quantization.quality import Meter
    from llmkit.transforms import lora

    first, second = (open_model(m, force=writing.force) for m in (base, tuned))
    with SurveyStage(out, first, second, writing, {"rank": rank, "energy": energy}) as surveying:
        survey = lora.survey(first, second, rank=rank, energy=energy, through=surveying.findings)
        meter = Meter()
        adapter = lora.extract(first, second, rank=rank, energy=energy, found=survey, meter=meter)
        surveying.end()
        write(out, adapter, writing, finish=_measured(out, meter, "relative error", "extracted"))
        surveying.forget()


def _measured(out: Output, meter: Meter, column: str, verb: str) -> Callable[[Mapping[str, Any]], Addition]:
    """The document and the table of what a meter saw."""
    key = column.replace(" ", "_")

    def finish(_manifest: Mapping[str, Any]) -> Addition:
        measured, unmeasured = meter.measured(), meter.unmeasured()
        document = {
            "modules": len(measured),
            key: meter.overall() if measured else None,
            "largest": [{"name": m.name, key: m.relative_error} for m in meter.worst(5)],
            "all": {m.name: m.relative_error for m in measured},
            "unmeasured": unmeasured,
        }

        def render() -> None:
            if measured:
                mean = sum(m.relative_error for m in measured) / len(measured)
                n = counted(len(measured), "module")
                out.line(f"{n} {verb}; {column} {meter.overall():.4f} over all, {mean:.4f} on average; the largest:\n")
                rows = [(m.name, f"{m.relative_error:.4f}") for m in meter.worst(5)]
                out.table(["module", column], rows, right=[column])
            if unmeasured:
                out.line(f"not measured: {counted(len(unmeasured), 'module')} that the interrupted run had written")

        return document, render

    return finish
