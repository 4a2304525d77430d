"""Quantize the linear layers: a method puts each weight on a grid, a codec stores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import require_model
from llmkit.checkpoint.quantized import model_dtype
from llmkit.errors import InputError, SpecError, listing
from llmkit.quantization.codec import Codec, FolderCodec, folder_codec
from llmkit.quantization.matrix import Grid, QuantizedMatrix
from llmkit.quantization.method import Method, Quantizer, Task, method_named, quantized
from llmkit.quantization.quality import Meter
from llmkit.tensors.device import CPU, device_named
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType
from llmkit.transforms.layers import GroupSize, spelled_for, stacks_in_floats
from llmkit.transforms.recipe import Recipe, Scheme, recipe_attrs
from llmkit.transforms.schemes import assign_grids, distinct
from llmkit.transforms.storing import encoded_checkpoint

_FLOATS = (DType.F32, DType.F16, DType.BF16)


def quantize(
    ckpt: Checkpoint,
    *,
    bits: int | None,
    group_size: GroupSize = "auto",
    symmetric: bool | None = None,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
    method: str | None = None,
    iterations: int | None = None,
    act_order: bool | None = None,
    recipe: Recipe | None = None,
    type: str = "",
    format: str = "compressed-tensors",
    activations: str | None = None,
    quantizer: Quantizer | None = None,
    meter: Meter | None = None,
    device: str = CPU,
) -> Checkpoint:
    """Put the weights of the linear layers on a grid; embeddings, norms, biases and the head stay as they are.

    The result loads in transformers unchanged (with compressed-tensors installed), and in llmkit.

    Args:
        bits: of each weight, as the format has them; None: what the recipe does not name stays as it is.
        group_size: input columns that share a scale, or "channel" for one scale a row. "auto" is the largest of 64 and
            32 that divides every row; for 8 bits 128, too, and one scale a row where none divides.
        symmetric: a grid centred on zero; otherwise each group has a zero point. None: asymmetric, where the format has
            zero points, and its loaders take them on several grids, where there are several.
        keep: globs of module or tensor names to leave as they are.
        only: globs of the modules to quantize, instead of all linear layers; may name the head.
        method: the name of an entry point in `llmkit.methods`. None: GPTQ with a quantizer, and without one rounding to
            nearest on the grid with the least error.
        iterations, act_order: of methods that have them (`Method.configured`); None for what is usual.
        recipe: grids of single matrices by globs, which may name the head (`llmkit.transforms.recipe`).
        type: what codes stand for: "int", "nf4", "fp4" or "fp8", where the format has it. Empty: integers; nf4 where
            the format has no integers of these bits.
        format: the name of an entry point in `llmkit.codecs`, of a layout of folders.
        activations: what engines are to round the inputs of layers to, as the format can say it ("int8").
        quantizer: `llmkit.calibration.CalibratedQuantizer`, for methods that look at the inputs of each layer; of the
            checkpoint as `llmkit.transforms.layers.spelled_for` gives it.
        meter: collects the relative error of every weight while it is written.
        device: where methods compute, and the blocks of a model that is calibrated: one block or matrix at a time.

    Raises:
        InputError: no such method or format, or a setting that the method does not have.
        SpecError: a group size that does not divide a row, a glob that matches nothing, nothing left to quantize.
        RequirementError: already quantized; an architecture that no plugin describes (unless `only` names layers);
            layers that are stored transposed; a method that needs statistics, and there are none; no such device.
    """
    device = device_named(device)
    require_model(ckpt, "quantize", floats=True)
    method = method or (quantizer.default_method if quantizer is not None else "mse")
    algorithm = method_named(method, is_calibrated=quantizer is not None).configured(
        iterations=iterations, act_order=act_order
    )
    codec = folder_codec(format)
    if activations is not None:
        codec = codec.with_activations(activations)
    ckpt, recipe = spelled_for(ckpt, codec), recipe or {}
    chosen = assign_grids(ckpt, codec, Scheme(bits, group_size, symmetric, type), recipe, keep, only)
    _refuse_grids(algorithm, codec, chosen.grids)
    wanted = model_dtype(ckpt.config)

    def made(weight: Lazy, name: str) -> QuantizedMatrix:
        observe = meter.observer(name, weight.shape[0]) if meter is not None else None
        scale_dtype = scale_dtype_of(ckpt, name, codec, wanted)
        task = Task(weight, algorithm, chosen.grids[name], scale_dtype, name, observe, device)
        return quantizer(task) if quantizer is not None else quantized(task)

    matrices: dict[str, QuantizedMatrix] = {}
    kinds: dict[tuple[int, int, int], QuantizedMatrix] = {}  # by the grid and the forms of what is stored and read
    for name, lazy in chosen.weights.items():
        if quantizer is not None:  # which knows the inputs of each
            matrices[name] = made(lazy, name)
            continue
        if meter is not None:
            meter.expect(name, lazy.shape[0])
        kind = id(chosen.grids[name]), ckpt.tensors[name].spec.form, lazy.spec.form
        matrices[name] = kinds.get(kind) or kinds.setdefault(kind, made(lazy, name))
    tensors, notes = dict(ckpt.tensors), [f"{chosen.words}, {algorithm.words}"]
    if quantizer is not None:
        notes.append(quantizer.words())
        tensors |= quantizer.changed()
    notes += _left_in_floats(ckpt, chosen.layers.ignored, stacks_in_floats(ckpt, only), format)
    grids = distinct(chosen.grids.values())
    step = {
        "transform": "quantize", **algorithm.attrs(), "format": format,
        **(grids.pop().attrs() if len(grids) == 1 else {}), **({"activations": activations} if activations else {}),
        **({"recipe": recipe_attrs(recipe)} if recipe else {}), "keep": list(keep), "only": list(only),
        **(quantizer.attrs() if quantizer is not None else {}), **({"device": device} if device != CPU else {}),
    }  # fmt: skip
    return encoded_checkpoint(
        ckpt.derive(tensors=tensors, step=step, notes=notes),
        codec,
        matrices,
        chosen.layers,
        (chosen.weights, made) if quantizer is None else None,
    )


def _refuse_grids(algorithm: Method, codec: FolderCodec, grids: Mapping[str, Grid]) -> None:
    for grid in distinct(grids.values()):
        if algorithm.gives_order(grid) and not codec.holds_order:
            said = f"--act-order: --format {codec.name} has no columns in another order"
            raise SpecError(said, hint="leave --act-order out, or take --format gptq")
        if (why := algorithm.refuses(grid)) is not None:
            name = next(name for name, its in grids.items() if its == grid)
            raise InputError(f"--method {algorithm.name} {why} ({name})", hint="--method mse takes every grid")


def _left_in_floats(ckpt: Checkpoint, layers: Sequence[str], stacks: Sequence[str], format: str) -> Iterator[str]:
    """What is told of linear layers, and of stacks of experts, that no matrix of codes holds."""
    if layers:
        yield f"linear layers kept as they are: {listing(layers)}"
    if stacks:
        share = sum(ckpt.specs[name].numel for name in stacks) / sum(spec.numel for spec in ckpt.specs.values())
        yield (
            f"experts in stacks stay in floats, {share:.0%} of all weights: {format} holds single matrices "
            f"({listing(stacks, 1)})"
        )


def scale_dtype_of(ckpt: Checkpoint, name: str, codec: Codec, wanted: DType | None) -> DType:
    """The model's dtype `wanted`, or that of the weight, where the layout has scales in it.

    transformers casts scales to it: a grid of finer ones would not be the one that runs.
    """
    stored = ckpt.tensors[name].dtype
    if stored not in _FLOATS:
        raise SpecError(
            f"{name} is {stored.name}; expected float32, float16 or bfloat16 weights",
            hint=f"llmkit convert MODEL --to hf --dtype {'float32' if stored is DType.F64 else 'bfloat16'} -o OUT, "
            "then quantize that",
        )
    dtype = wanted or stored
    return dtype if dtype in codec.scale_dtypes else codec.scale_dtypes[0]
