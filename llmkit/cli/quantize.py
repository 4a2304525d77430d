"""`llmkit quantize`: linear layers to integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli import completion
from llmkit.cli.command import command
from llmkit.cli.grid_options import CalibrationOptions, GridOptions, MixedPrecisionOptions
from llmkit.cli.held_out import held_out_text
from llmkit.cli.options import MAY_NAME_A_FILE, ModelArgument, WriteOptions
from llmkit.cli.output import Mode, Output
from llmkit.cli.quantized import write_quantized
from llmkit.cli.writing import require_place
from llmkit.errors import InputError
from llmkit.tensors.spec import format_bytes

if TYPE_CHECKING:
    from llmkit.calibration.bit_allocation import BitAllocation, Target
    from llmkit.calibration.quantizer import CalibratedQuantizer
    from llmkit.calibration.samples import Samples
    from llmkit.calibration.stored import StoredQuantizer
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.checkpoint.statistics import StoredStatistics
    from llmkit.transforms.candidates import Candidates
    from llmkit.transforms.convert.targets import Target as Layout
    from llmkit.transforms.recipe import Recipe

_FEW = 4  # bits, where a recipe or a size says how many: calibrated


@dataclass(frozen=True, kw_only=True)
class RoundingOptions(GridOptions):
    """The options of grids, and of single methods that round to them."""

    iterations: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="How long signround learns each block (default: 200; 1000 for fewer than 4 bits).",
        ),
    ] = None
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="Whether --method gptq groups columns by how large their inputs are, and stores the group of each "
            "(desc_act) (default: no).",
        ),
    ] = None


@command(
    "llmkit quantize vicuna-7b --bits 4 -o vicuna-7b-int4",
    "llmkit quantize vicuna-7b --bits 8 -o vicuna-7b-int8 --dry-run",
    "llmkit quantize vicuna-7b --bits 4 --group-size 32 --symmetric --keep '*.down_proj' -o out",
    "llmkit quantize vicuna-7b --bits 4 --calibration my.jsonl --samples 256 -o vicuna-7b-mine",
    "llmkit quantize vicuna-7b --bits 4 --calibration none --method rtn -o vicuna-7b-rtn",
    "llmkit quantize vicuna-7b --bits 4 --format gguf -o vicuna-7b-gguf",
    "llmkit quantize vicuna-7b --bits 8 --type fp8 -o vicuna-7b-fp8",
    "llmkit quantize vicuna-7b --bits 4 --format bitsandbytes -o vicuna-7b-nf4",
    "llmkit quantize vicuna-7b --target-size 4GB -o vicuna-7b-4gb",
)
def quantize(
    out: Output,
    model: ModelArgument,
    writing: WriteOptions,
    grids: RoundingOptions,
    mixed_precision: MixedPrecisionOptions,
    calibrating: CalibrationOptions,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="2|3|4|8",
            help="Bits of each weight; 5 and 6, too, for --format gguf.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.quantization_formats,
            help="The layout of what is written; gguf: llama.cpp's preset for these bits (convert --to gguf has all).",
        ),
    ] = "compressed-tensors",
    type: Annotated[
        str,
        typer.Option(
            metavar="int|nf4|fp4|fp8",
            help="What the bits stand for, where the format has more than integers: fp8 (e4m3, one scale a row, with "
            "--bits 8) in compressed-tensors, nf4 and fp4 (--bits 4) in bitsandbytes.",
            show_default=False,
        ),
    ] = "",
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="Engines round the inputs of layers to this as they come, too: with --bits 8, W8A8.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        MAY_NAME_A_FILE,
        typer.Option(
            metavar="FILE|rest",
            help="Then measure, on a text or the rest of the calibration text: perplexity before and after, divergence "
            "from the float model, flipped tokens. Never on windows that calibration read.",
        ),
    ] = None,
) -> None:
    """Quantize the linear layers of a model to codes of 2 to 8 bits.

    Embeddings, norms, biases and the head stay as they are. The result is in the compressed-tensors layout, which
    transformers and vLLM load unchanged. Fewer than 8 bits are chosen for the inputs that layers have while the model
    reads a text (--calibration). Prints the sizes, bits per weight and the layers with the largest error.
    """
    from llmkit.calibration.ranks import rank
    from llmkit.checkpoint.classification import open_model, require_model
    from llmkit.quantization.codec import folder_codec
    from llmkit.quantization.quality import Meter
    from llmkit.transforms.convert.targets import targets
    from llmkit.transforms.layers import points_of, spelled_for
    from llmkit.transforms.quantize import quantize as quantize_checkpoint

    if rank():
        out = replace(out, mode=Mode.QUIET)
    layout = targets().get(format)
    codec = folder_codec(format) if layout is None or not layout.of_bits else None
    if bits is None and codec is not None and type not in ("", "int") and not mixed_precision.is_given:
        points = points_of(codec, None, type)
        bits = points.bits if points is not None else None
    target, device = mixed_precision.target(bits), calibrating.where
    before = require_model(open_model(model, force=writing.force), "quantize", floats=True)
    require_place(writing)
    if codec is not None:
        before = spelled_for(before, codec)
    recipe = mixed_precision.rules(layout.as_filed(before) if layout is not None else before)
    known = calibrating.known(out, before, grids.method, _FEW if bits is None else bits)
    if layout is not None and layout.of_bits:
        if rank():
            return
        _in_blocks(out, before, writing, calibrating, _Blocks(format, layout, bits, recipe, target, known), evaluate)
        return
    meter, chosen = Meter(), None
    if target is not None:
        chosen = _bits_for_size(out, before, target, format, grids, recipe, known, device)
        recipe = {**chosen.recipe, **recipe}
    quantizer = calibrating.quantizer(before, known, None if target else grids.method)  # the head may be chosen, too
    after = quantize_checkpoint(
        before,
        bits=bits,
        iterations=grids.iterations,
        act_order=grids.act_order,
        type=type,
        recipe=recipe,
        format=format,
        activations=activations,
        meter=meter,
        quantizer=quantizer,
        device=device,
        **grids.arguments,
    )
    held = held_out_text(before, evaluate, calibrating, quantizer) if evaluate and not writing.dry_run else None
    write = partial(write_quantized, out, before, after, writing, held, meter=meter, quantizer=quantizer, chosen=chosen)
    _write_by_one(write, None if writing.dry_run else quantizer)


def _write_by_one(write: Callable[[], None], quantizer: CalibratedQuantizer | StoredQuantizer | None) -> None:
    """Let the first of the processes that calibrate together write; the others compute for it meanwhile."""
    from llmkit.calibration.ranks import rank

    shared = None
    if quantizer is not None:
        from llmkit.calibration.quantizer import CalibratedQuantizer

        shared = quantizer if isinstance(quantizer, CalibratedQuantizer) else None
    if not rank():
        write()
        if shared is not None:
            shared.ranks.end()
    elif shared is not None:
        shared.serve()


def _chosen(
    out: Output,
    before: Checkpoint,
    target: Target,
    candidates: Candidates,
    known: Samples | StoredStatistics | None,
    device: str,
) -> BitAllocation:
    """Bits of each matrix for a size; the table of them is shown."""
    from llmkit.calibration.bit_allocation import choose_bits

    chosen = choose_bits(before, target, candidates, known, report=out.doing, device=device)
    out.note(chosen.words())
    columns = ["matrices", "layers", "stored as", "size", "error", "if smaller"]
    rows = [
        (c.role, c.layers, c.scheme, format_bytes(c.nbytes), f"{c.error:.2g}", _maybe(c.next_error))
        for c in chosen.choices
    ]
    if out.is_human:
        out.table(columns, rows, right=columns[3:])
    return chosen


def _maybe(number: float | None) -> str:
    return "" if number is None else f"{number:.2g}"


def _bits_for_size(
    out: Output,
    before: Checkpoint,
    target: Target,
    format: str,
    grids: GridOptions,
    recipe: Recipe,
    known: Samples | StoredStatistics | None,
    device: str,
) -> BitAllocation:
    """Bits of each matrix in a layout of grids; what cannot be quantized so is refused before anything is measured."""
    from llmkit.calibration.stored import StoredQuantizer
    from llmkit.checkpoint.statistics import StoredStatistics
    from llmkit.quantization.method import method_named
    from llmkit.transforms.candidates import codec_candidates

    out.refuse_options({"type"}, "a run that chooses bits for a size, which are of integers")
    if grids.method is not None:
        method = method_named(grids.method, is_calibrated=known is not None)
        if isinstance(known, StoredStatistics):
            StoredQuantizer(before, known).refuse_unfit(method)
    given = {name: value for name, value in grids.arguments.items() if name != "method"}
    return _chosen(out, before, target, codec_candidates(before, format, recipe=recipe, **given), known, device)


@dataclass(frozen=True)
class _Blocks:
    """What is asked of a layout of blocks, which chooses their types by matrix: as of `quantize`."""

    format: str
    layout: Layout
    bits: int | None
    recipe: Recipe
    target: Target | None
    known: Samples | StoredStatistics | None


def _in_blocks(
    out: Output,
    before: Checkpoint,
    writing: WriteOptions,
    calibrating: CalibrationOptions,
    blocks: _Blocks,
    evaluate: str | None,
) -> None:
    """Write a layout of blocks: a preset by how sensitive matrices are known to be, a recipe, or what is measured."""
    from llmkit.calibration.observe import observed
    from llmkit.calibration.samples import Samples
    from llmkit.calibration.stored import StoredQuantizer
    from llmkit.quantization.codec import alternatives
    from llmkit.transforms.convert import convert

    grids = {"group_size", "symmetric", "type", "keep", "only", "method", "iterations", "act_order", "activations"}
    out.refuse_options(grids, f"--format {blocks.format}, whose presets choose types of blocks by matrix")
    of_bits = blocks.layout.of_bits
    if blocks.bits is not None and blocks.bits not in of_bits:
        raise InputError(f"--bits {blocks.bits}: expected {alternatives(sorted(of_bits))}", hint="--bits 4")
    device = calibrating.where
    if not isinstance(blocks.known, Samples):
        out.refuse_options({"device"}, f"--format {blocks.format} without a text: blocks are searched on the CPU")
    if evaluate == "rest":
        raise InputError(f"--evaluate rest is not for --format {blocks.format}", hint="--evaluate FILE")
    recipe, chosen = blocks.recipe, None
    if blocks.target is not None and blocks.layout.candidates is not None:
        written = convert(before, to=blocks.format, recipe=recipe)
        candidates = blocks.layout.candidates(before, written, recipe)
        chosen = _chosen(out, before, blocks.target, candidates, blocks.known, device)
        recipe = {**chosen.recipe, **recipe}
    known, notes = blocks.known, list[str]()
    if isinstance(known, Samples):
        found, windows = observed(before, known, ["squares"], device=device)
        statistics: StoredStatistics | None = found
        notes = [known.words(), *known.shortfall(len(windows))]
    else:
        statistics = known
    given: dict[str, Any] = dict(of_bits[blocks.bits]) if blocks.bits is not None else {}
    given |= {"statistics": statistics} if statistics is not None else {}
    given |= {"recipe": recipe} if recipe else {}
    after = convert(before, to=blocks.format, **given).derive(notes=notes)
    quantizer = StoredQuantizer(before, statistics) if statistics is not None else None
    held = held_out_text(before, evaluate, calibrating, quantizer) if evaluate and not writing.dry_run else None
    write_quantized(out, before, after, writing, held, chosen=chosen)
