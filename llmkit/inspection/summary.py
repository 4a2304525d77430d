"""What a checkpoint is, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.architecture.check import Report
from llmkit.architecture.kind import Kind
from llmkit.architecture.model import Model
from llmkit.architecture.slots import Slot
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import classify
from llmkit.checkpoint.manifest import recipe_of
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.checkpoint.text_part import text_part
from llmkit.errors import LlmkitError
from llmkit.formats.gguf_types import TYPE_BY_NAME
from llmkit.inspection.oddities import find_oddities, find_problems
from llmkit.layouts import onnx_folder
from llmkit.quantization.matrix import dequantized_from
from llmkit.tensors.lazy import Lazy
from llmkit.tokenization.agreement import embedding_rows
from llmkit.tokenization.vocabulary import Vocabulary, read_vocabulary

_DIMS = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context")
# Slot ids begin with these; what is in no slot (buffers, foreign tensors) is "other".
_PARTS = ("embedding", "attention", "mlp", "norms", "head", "other")


@dataclass
class Part:
    """A share of the model: embedding, attention, mlp, norms, head, other."""

    name: str
    n_tensors: int = 0
    nbytes: int = 0
    n_parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What `llmkit inspect` shows.

    Attributes:
        claimed: `architectures` or `model_type` of the config.
        architecture: the plugin that describes it, None when none does.
        dims: sizes by name, empty without an architecture.
        mechanisms: the sizes of what its layers are made of, in words (`heads 32 × 128 (kv 8)`).
        n_parameters: elements of the float model, without buffers.
        dtypes: dtype -> bytes stored.
        files: weight file -> bytes.
        recipe: what llmkit did to make it, when it did.
        layout: the file layout it was read from.
        details: what else its files say of themselves (`llmkit.layouts.layout.OpenedLayout`).
        kind, contents: as of `llmkit.checkpoint.classification.Classification`; only a model can be run.
        problems: contradictions between config, tensors and tokenizer: it cannot be run as it is.
        oddities: what else is odd.
    """

    label: str
    origin: str | None
    claimed: str | None
    architecture: str | None
    dims: Mapping[str, int]
    n_tensors: int
    n_parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    files: Mapping[str, int]
    parts: tuple[Part, ...]
    quantization: str | None
    vocabulary: Vocabulary | None
    recipe: tuple[Mapping[str, Any], ...]
    problems: tuple[str, ...]
    oddities: tuple[str, ...]
    kind: str = "model"
    contents: str = "a model"
    layout: str = "hf"
    details: Mapping[str, Any] = field(default_factory=dict)
    mechanisms: tuple[str, ...] = ()


def summarize(ckpt: Checkpoint) -> Summary:
    """Sum up a checkpoint. Reads no tensor data.

    A config that disagrees with the tensors, or that a plugin cannot read, is an oddity here, not an error.
    """
    contents = classify(ckpt)
    floats, trouble = _float_view(ckpt)
    model, report, more, unknown = _bind(floats)
    trouble += more
    try:
        vocabulary = read_vocabulary(ckpt)
    except LlmkitError as error:
        vocabulary = None
        trouble.append(error.message)
    parts = _parts(ckpt, floats, model, report)
    n_rows = embedding_rows(floats) if model is not None else None
    problems = [*trouble, *find_problems(report, vocabulary, n_rows)]
    oddities = [*unknown, *floats.warnings, *find_oddities(ckpt, report, vocabulary, n_rows)]
    dtypes: dict[str, int] = {}
    files: dict[str, int] = {}
    for lazy in ckpt.tensors.values():
        dtypes[lazy.dtype.name] = dtypes.get(lazy.dtype.name, 0) + lazy.spec.nbytes
        for read in lazy.reads():
            files[read.source.path.name] = read.source.nbytes
    graph: Mapping[str, Any] = ckpt.details.get("onnx", {})
    n_parameters = graph.get("n_parameters")  # of another program's graph, whose weights may lie inside it
    if n_parameters is None:
        n_parameters = sum(p.n_parameters for p in parts)
    elif graph["inside_nbytes"]:
        dtypes = {**dtypes, **{name: dtypes.get(name, 0) + n for name, n in graph["inside"].items()}}
        files[onnx_folder.MODEL] = graph["graph_nbytes"]
    stored: Mapping[str, Mapping[str, int]] = ckpt.details.get("types", {})
    if stored:
        dtypes = {name: entry["nbytes"] for name, entry in stored.items()}
    return Summary(
        label=ckpt.label,
        origin=str(ckpt.origin) if ckpt.origin is not None else None,
        claimed=_claimed(ckpt.config),
        architecture=model.family if model else None,
        dims={k: v for k in _DIMS if (v := getattr(model.dims, k)) is not None} if model else {},
        n_tensors=len(ckpt.tensors),
        n_parameters=n_parameters,
        nbytes=sum(dtypes.values()),
        dtypes=dict(sorted(dtypes.items(), key=lambda kv: -kv[1])),
        files=dict(sorted(files.items())),
        parts=parts if graph.get("n_parameters") is None else (),
        quantization=_grids(ckpt) or describe(ckpt),
        vocabulary=vocabulary,
        recipe=recipe_of(ckpt.origin) if ckpt.origin is not None and ckpt.origin.is_dir() else (),
        problems=tuple(dict.fromkeys(problems)),
        oddities=tuple(dict.fromkeys(oddities)),
        kind=contents.kind,
        contents=contents.words,
        layout=ckpt.layout,
        details=ckpt.details,
        mechanisms=_mechanisms(model) if model else (),
    )


def _mechanisms(model: Model) -> tuple[str, ...]:
    kinds = [k for b in model.blocks for k in (b, getattr(b, "attention", None), getattr(b, "mlp", None))]
    return tuple(dict.fromkeys(words for k in kinds if isinstance(k, Kind) and (words := k.words(model.dims))))


def _grids(ckpt: Checkpoint) -> str | None:
    """The integers that an exported graph computes with, and the number of operators of each kind."""
    integers: Mapping[str, int] = ckpt.details.get("onnx", {}).get("integers", {})
    return "; ".join(f"{n} × {words}" for words, n in integers.items()) or None


def _claimed(config: Mapping[str, Any]) -> str | None:
    stated = config.get("architectures")
    if isinstance(stated, list) and stated:
        return ", ".join(map(str, stated))
    return str(config["model_type"]) if config.get("model_type") else None


def _float_view(ckpt: Checkpoint) -> tuple[Checkpoint, list[str]]:
    if ckpt.layout == onnx_folder.NAME:
        return ckpt, []  # its config may speak of how the source was quantized, its tensors are those of the graph
    try:
        return dequantized(ckpt), []
    except LlmkitError as error:
        return ckpt, [error.message]


def _bind(floats: Checkpoint) -> tuple[Model | None, Report | None, list[str], list[str]]:
    """The bound model and its report; problems; and what is only odd."""
    claimed = _claimed(floats.config)
    if claimed is None:
        return None, None, [], []
    try:
        model = floats.model
        if model is None:
            inner = text_part(floats)
            if inner is not floats:
                return *_bind(inner)[:3], list(inner.notes[-1:])
            return None, None, [], [f"no plugin describes {claimed}: names and shapes are not checked"]
        refused, said = list(model.unread.refused), list(model.unread.warnings)
        if floats.layout == onnx_folder.NAME:
            return model, None, refused, said  # a graph leaves out what it does not need, and has tensors of its own
        return model, model.check(floats.specs), refused, said
    except LlmkitError as error:
        return None, None, [error.message], []


def _n_floats(name: str, lazy: Lazy, slots: Mapping[str, Slot]) -> int:
    """Elements of the float model that a tensor stands for; a graph has codes, scales and more for one."""
    stem, _, leaf = name.rpartition(".")
    if leaf in ("k_scale", "v_scale"):
        return 0  # of a cache in integers
    if leaf not in ("weight_codes", "weight_scales", "weight_zeros", "weight_offsets") or f"{stem}.weight" not in slots:
        return lazy.spec.numel
    return slots[f"{stem}.weight"].numel if leaf == "weight_codes" else 0


def _stored_as(lazy: Lazy) -> tuple[str, int]:
    """The dtype of a tensor, or the type of the GGUF blocks that it is read from, and its bytes there."""
    blocks = TYPE_BY_NAME.get(dequantized_from(lazy))
    if blocks is None:
        return lazy.dtype.name, lazy.spec.nbytes
    return blocks.name, lazy.spec.numel // blocks.block * blocks.nbytes


def _parts(ckpt: Checkpoint, floats: Checkpoint, model: Model | None, report: Report | None) -> tuple[Part, ...]:
    parts = {name: Part(name) for name in _PARTS}
    slots = model.tensors() if model else {}
    ignored = dict.fromkeys(report.ignored) if report else {}

    def part_of(name: str) -> Part:
        # A quantized layer stores `x.weight_packed`, `x.weight_scale`, … for the slot `x.weight`.
        slot = slots.get(name) or slots.get(name.rpartition(".")[0] + ".weight")
        if slot is None:
            return parts["other"]
        if slot.kind in ("embedding", "head"):
            return parts[slot.kind]
        if slot.kind == "norm" or "norm" in slot.id:
            return parts["norms"]
        return parts["attention" if ".attn." in slot.id else "mlp" if ".mlp." in slot.id else "other"]

    for name, lazy in ckpt.tensors.items():
        part, (kind, nbytes) = part_of(name), _stored_as(lazy)
        part.n_tensors += 1
        part.nbytes += nbytes
        part.dtypes[kind] = part.dtypes.get(kind, 0) + nbytes
    for name, lazy in floats.tensors.items():
        if name not in ignored:
            part_of(name).n_parameters += _n_floats(name, lazy, slots)
    return tuple(p for p in parts.values() if p.n_tensors)
