"""Export: a checkpoint as a folder that ONNX Runtime runs, its weights where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from llmkit.architecture.model import Model
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.text_part import float_text_part
from llmkit.errors import InputError, listing, require_choice
from llmkit.formats.folder import INDEX_NAMES, weight_set
from llmkit.layouts import onnx_folder
from llmkit.lazy_imports import onnx
from llmkit.onnx.container import OnnxFiles, Place
from llmkit.onnx.context import IN_PLACE, AttentionOp
from llmkit.onnx.folder_files import large_files, runtime_files
from llmkit.onnx.genai import genai_config, unfed_inputs
from llmkit.onnx.integer_matrices import IntegerMatrices
from llmkit.onnx.kv_cache import choose_scales
from llmkit.onnx.model import build_graph, first_graph
from llmkit.onnx.opening import PROVIDERS
from llmkit.onnx.precision import Precision
from llmkit.onnx.quantized_weights import choose_grids, restored
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.spec import DType

Weights = Literal["link", "copy"]
WEIGHTS: tuple[Weights, ...] = ("link", "copy")
ATTENTIONS: tuple[AttentionOp, ...] = ("gqa", "flash", "attention", "mha")
_FASTEST: dict[str, tuple[AttentionOp, ...]] = {
    "cpu": ("gqa", "attention", "mha"),
    "cuda": ("flash", "gqa", "attention", "mha"),
}
_COMPUTE = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
_SCALES = {"FLOAT": DType.F32, "FLOAT16": DType.F16, "BFLOAT16": DType.BF16}
_FLOAT_PRECISION = Precision()


def export(
    ckpt: Checkpoint,
    *,
    weights: Weights | None = None,
    dtype: str = "float32",
    attention: AttentionOp | None = None,
    precision: Precision = _FLOAT_PRECISION,
    provider: str = "cpu",
    kv_cache_dtype: str | None = None,
    calibration: Path | None = None,
) -> Checkpoint:
    """The checkpoint as an ONNX folder.

    Args:
        weights: `link` refers to the source files where a tensor is there as it is; `copy` writes all anew. By default
            files are linked of which most is used.
        dtype: the compute dtype; weights keep the dtype they are stored in.
        attention: the op that computes attention; by default the fastest that can compute the model.
        precision: which matrices are computed from integers. Those of a quantized checkpoint stay as they are.
        provider: what the graph is for, `cpu` or `cuda`. The CPU computes bfloat16 weights in float32.
        kv_cache_dtype: of keys and values between calls: int8; None: the compute dtype.
        calibration: a text that tells the ranges of an int8 cache; None: the checkpoint's scales, or llmkit's own text.

    Raises:
        InputError: an option that is unknown, or that the kernels do not have.
        RequirementError: no plugin describes it, a kind has no emitter, or the attention op cannot compute it.
        SpecError: the tensors do not fit the config.
    """
    require_choice("--weights", weights or WEIGHTS[0], WEIGHTS)
    require_choice(
        "--attention", attention or ATTENTIONS[0], ATTENTIONS, "leave it out: llmkit takes the fastest that can"
    )
    opened = ckpt
    ckpt, model, compute, grids, notes = _prepared(opened, dtype, precision, provider)
    cache = None
    if kv_cache_dtype is not None:
        floats = ckpt.derive(tensors=restored(ckpt.tensors, model, grids))
        cache, more = choose_scales(
            opened, floats, model, dtype=kv_cache_dtype, calibration=calibration, provider=provider
        )
        notes += more
        attention = attention or "gqa"
    elif calibration is not None:
        raise InputError("--calibration is for a cache in integers", hint="give --kv-cache-dtype int8, too")
    used: dict[str, Lazy] = {}

    def build(op: AttentionOp) -> onnx.ModelProto:
        used.clear()
        note_use = used.__setitem__
        return build_graph(model, ckpt.tensors, note_use, dtype=compute, attention=op, grids=grids, cache=cache)

    chosen, graph = first_graph(_candidates(attention, compute, provider), build)
    linked, sources = _linked(used, always=weights == "link") if weights != "copy" else ({}, {})
    files, more = runtime_files(ckpt)
    notes += more
    if chosen == "flash":
        notes.append("rows of a batch are padded on the right, as ONNX Runtime GenAI and llmkit do; Optimum pads left")
    if unfed := unfed_inputs(graph, model):
        notes.append(f"for llmkit only: no other runtime feeds {listing(unfed, 2)} to the graph; no genai_config.json")
    else:
        files["genai_config.json"] = FileContent.of_json(genai_config(ckpt, model, chosen, provider))
    if sources:
        files |= _index(ckpt)
        notes.append(f"{len(linked)} tensors stay in {', '.join(sources)}, shared with the source")
        for name, path in large_files(files).items():  # a vocabulary is larger than the graph
            sources[name] = path
            del files[name]
    return ckpt.derive(
        tensors={name: lazy for name, lazy in used.items() if name not in linked},
        config={},
        files=files,
        step={"transform": "export", "to": "onnx", "weights": "link" if linked else "copy", "dtype": dtype}
        | {"attention": chosen, "provider": provider}
        | ({"kv_cache_dtype": kv_cache_dtype} if kv_cache_dtype is not None else {})
        | precision.attrs(),
        notes=notes,
        warnings=model.unread.warnings,
        container=OnnxFiles(graph, linked, sources),
    )


def computed_weights(
    ckpt: Checkpoint, *, dtype: str = "float32", precision: Precision = _FLOAT_PRECISION, provider: str = "cpu"
) -> Checkpoint:
    """The float checkpoint of the weights that a graph exported with the same options computes with."""
    floats, model, _, grids, _ = _prepared(ckpt, dtype, precision, provider)
    return floats.derive(tensors=restored(floats.tensors, model, grids))


def _prepared(
    ckpt: Checkpoint, dtype: str, precision: Precision, provider: str
) -> tuple[Checkpoint, Model, str, IntegerMatrices, list[str]]:
    """The checkpoint in floats, its model, the compute dtype in ONNX's words, and what is computed from integers."""
    require_choice("--dtype", dtype, tuple(_COMPUTE))
    require_choice("--provider", provider, tuple(PROVIDERS))
    ckpt = float_text_part(ckpt)
    model = ckpt.require_model()
    model.unread.raise_if_refused(ckpt.label)
    _refuse_changed(ckpt, model)
    report = model.check(ckpt.specs)
    report.raise_if_bad(ckpt.label)
    compute, notes = _COMPUTE[dtype], []
    if provider == "cpu" and compute == "BFLOAT16":
        compute = "FLOAT"
        notes.append("the CPU has no bfloat16 arithmetic: the graph computes in float32, weights stay as they are")
    elif provider == "cpu" and compute == "FLOAT16":
        notes.append("the CPU multiplies float16 matrices in float32: results are rounded to float16, nothing is saved")
    grids, more = choose_grids(ckpt, model, precision, scale_dtype=_SCALES[compute], provider=provider)
    return ckpt, model, compute, grids, [*notes, *more, *report.notes]


def _refuse_changed(ckpt: Checkpoint, model: Model) -> None:
    """Refuse an exported folder whose weights are no longer those of the model: quantized, or normalised."""
    missing = model.tensors().keys() - ckpt.tensors.keys() if ckpt.layout == onnx_folder.NAME else ()
    if missing:
        raise InputError(
            f"{ckpt.label} is an exported folder, and {len(missing)} of its weights were changed for its graph",
            hint=f"export the model that it was made from; llmkit inspect {ckpt.origin or ckpt.label} shows how it was "
            "made",
        )


def _candidates(attention: AttentionOp | None, dtype: str, provider: str) -> Sequence[AttentionOp]:
    """The ops for attention that may be taken, the fastest first.

    Raises:
        InputError: the one asked for has no kernel for the dtype.
    """
    has_kernel = provider != "cuda" or dtype != "FLOAT"
    if attention is None:
        return [op for op in _FASTEST[provider] if has_kernel or op not in IN_PLACE]
    if attention in IN_PLACE and not has_kernel:
        raise InputError(
            f"--attention {attention}: GroupQueryAttention on CUDA computes float16 and bfloat16, found float32",
            hint="--dtype float16, or --attention attention",
        )
    return (attention,)


def _linked(used: Mapping[str, Lazy], *, always: bool) -> tuple[dict[str, Place], dict[str, Path]]:
    """Places of the tensors that lie in a file as they are needed, and the files by the name they get.

    A file of which less than half is used is not taken into the folder, unless that is asked for.
    """
    places: dict[str, Place] = {}
    sources: dict[str, Path] = {}
    for name, lazy in used.items():
        node = lazy.node
        if not isinstance(node, Read) or node.strides is not None:
            continue
        file = node.source.path.name
        if sources.setdefault(file, node.source.path) != node.source.path:
            continue  # two folders have a file of this name: the second one's tensors are written
        places[name] = Place(file, node.offset, lazy.spec.nbytes)
    if not always:
        nbytes = {file: sum(p.nbytes for p in places.values() if p.file == file) for file in sources}
        sources = {file: path for file, path in sources.items() if 2 * nbytes[file] >= path.stat().st_size}
    return {name: place for name, place in places.items() if place.file in sources}, sources


def _index(ckpt: Checkpoint) -> dict[str, FileContent]:
    """The index of the shards that are linked: the folder is a checkpoint, too."""
    if ckpt.origin is None or not ckpt.origin.is_dir():
        return {}
    index = weight_set(ckpt.origin)
    return {index.name: FileContent(path=index)} if index is not None and index.name in INDEX_NAMES else {}
