"""Statistics of the inputs of a model's weights, kept in a file: schemes are tried later without another pass.

The file is llmkit's own (`llmkit.checkpoint.statistics`), or an importance matrix of llama.cpp in either generation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.calibration.blocks import CHUNK_NBYTES, Blocks
from llmkit.calibration.observers import Observer
from llmkit.calibration.samples import Samples
from llmkit.calibration.stage import BlockStage
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import require_model
from llmkit.checkpoint.statistics import KEY, StoredStatistics, gguf_spelling
from llmkit.errors import InputError, RequirementError
from llmkit.formats import imatrix, safetensors
from llmkit.formats.container import OutputFile, OutputFiles
from llmkit.lazy_imports import torch
from llmkit.pipeline.stage import BlockResult
from llmkit.quantization.codec import error_context
from llmkit.tensors.constant import constant
from llmkit.tensors.device import CPU, to_device
from llmkit.tensors.lazy import Apply, Context, Lazy
from llmkit.tensors.rearrange import reshape
from llmkit.tensors.spec import DType, TensorSpec
from llmkit.tensors.whole import Whole

_FIELDS = ("squares", "maxima")


def observe(
    ckpt: Checkpoint, samples: Samples, name: str, *, has_moments: bool = False, device: str = CPU
) -> Checkpoint:
    """The statistics of all linear layers in the blocks of a model, as a checkpoint of one file.

    Args:
        ckpt: float tensors, and the tokenizer.
        samples: what the model reads.
        name: of the file; `.safetensors` for llmkit's own, `.gguf` and `.dat` for importance matrices of llama.cpp.
        has_moments: the second moments too, [in, in] for each weight, which GPTQ needs.
        device: where the model computes.

    Raises:
        InputError: another name, a text shorter than a sample, or an importance matrix that shall hold moments.
        RequirementError: no plugin describes the model, or llama.cpp does not know it.
    """
    write = _WRITERS.get(Path(name).suffix)
    if write is None:
        raise InputError(
            f"{name} is no file of statistics; expected {', '.join(_WRITERS)}", hint="-o statistics.safetensors"
        )
    if has_moments and write is not _own:
        raise InputError(
            f"{name} would be an importance matrix, which has no place for second moments",
            hint=f"-o {Path(name).with_suffix('.safetensors')}, or without --moments",
        )
    measured = (*_FIELDS, "second_moments") if has_moments else _FIELDS
    statistics, rows = observed(ckpt, samples, measured, device=device)
    statistics_file = write(ckpt, statistics.parts, samples, rows, name)
    step = {"transform": "observe", **samples.attrs(), "measured": list(measured)}
    words = f"{len(statistics.parts)} weights, {len(rows)} windows of {len(rows[0])} tokens"
    return statistics_file.derive(step=step, notes=[words])


def observed(
    ckpt: Checkpoint, samples: Samples, measured: Sequence[str], *, device: str = CPU
) -> tuple[StoredStatistics, Sequence[Sequence[int]]]:
    """The statistics of all linear layers in the blocks of a model, computed when they are read.

    Args:
        measured: fields of `Statistics`.
        device: where the model computes.

    Returns:
        The statistics, and the token ids that the model will have read.

    Raises:
        InputError: a text shorter than a sample.
        RequirementError: no plugin describes the model.
    """
    model = require_model(ckpt, "observe", floats=True).require_model()
    rows = samples.rows(ckpt, ckpt.prompt_suffix(), model.dims.context)
    work = len(model.blocks), [samples.attrs(), list(measured)]
    stage = BlockStage(ckpt, lambda context: rows, lambda: work, _observing(measured), device)
    by_weight: dict[str, dict[str, Lazy]] = {}
    for layer in range(len(model.blocks)):
        slots = [slot for slot in model.slots.values() if slot.layer == layer and slot.kind == "linear"]
        parts = {part.id: part.shape[-1] for slot in slots for part in slot.parts if len(part.shape) == 2}
        names = {f"{w}.{field}": _spec(field, n) for w, n in parts.items() for field in measured}
        for name, lazy in _node(ckpt, stage, layer, names, samples).items():
            weight, _, field = name.rpartition(".")
            by_weight.setdefault(weight, {})[field] = lazy
    n_tokens = dict.fromkeys(by_weight, float(len(rows) * len(rows[0])))
    return StoredStatistics(
        samples.text.label if samples.text is not None else "self", by_weight, n_tokens, samples.attrs()
    ), rows


def _observing(measured: Sequence[str]) -> Callable[[Blocks, int, Mapping[str, Lazy], Context], BlockResult]:
    def compute(blocks: Blocks, index: int, state: Mapping[str, Lazy], context: Context) -> BlockResult:
        hook = ObserverHook(measured)
        hidden = blocks.run(index, state["hidden"].load(), hook)
        return BlockResult({}, [("hidden", hidden)], hook.statistics.items())

    return compute


def _spec(field: str, n: int) -> TensorSpec:
    return TensorSpec(DType.F32, (n, n) if field == "second_moments" else (n,))


class ObserverHook:
    """A block hook that only collects statistics, named WEIGHT.FIELD."""

    def __init__(self, measured: Sequence[str]) -> None:
        self._measured = measured
        self._observers: dict[tuple[str, ...], Observer] = {}
        self.statistics: dict[str, torch.Tensor] = {}

    def see(self, weights: Sequence[str], x: torch.Tensor, float_x: torch.Tensor | None = None) -> None:
        self._observers.setdefault(tuple(weights), Observer(self._measured)).see(x)

    def settle(self, weights: Sequence[str], values: torch.Tensor) -> torch.Tensor:
        observer = self._observers.pop(tuple(weights), None) or Observer(self._measured)
        observer.see(values.new_empty((0, values.shape[1])))  # no token may have reached it
        statistics = observer.statistics()
        with error_context(weights[0]):
            statistics.require_finite()
        statistics = to_device(statistics, CPU)
        self.statistics |= {f"{w}.{field}": getattr(statistics, field) for w in weights for field in self._measured}
        return values


def _node(
    ckpt: Checkpoint, stage: BlockStage, layer: int, names: Mapping[str, TensorSpec], samples: Samples
) -> dict[str, Lazy]:
    """The statistics of one layer, as its block is computed; `names` are WEIGHT.FIELD."""
    model = ckpt.require_model()
    slots = [slot for slot in model.slots.values() if slot.layer == layer and slot.name in ckpt.tensors]
    hidden = samples.n * samples.length * model.dims.hidden
    chunk = min(CHUNK_NBYTES, 16 * hidden * (2 + model.dims.ffn // model.dims.hidden))
    # In float32: a block, the hidden states before and after it, and the activations of a chunk.
    peak = 4 * (sum(slot.numel for slot in slots) + 2 * hidden) + chunk if layer == 0 else 0

    def compute(context: Context) -> list[torch.Tensor]:
        stored = stage.block(layer, context).kept
        return [stored[name].load() for name in names]

    inputs, attrs = [ckpt.tensors[slot.name] for slot in slots], {"layer": layer, **samples.attrs()}
    node = Whole("observe", inputs, list(names.values()), compute, attrs, peak_nbytes=lambda: peak)
    return dict(zip(names, node.outputs(), strict=True))


@dataclass(frozen=True)
class _OneFile:
    """A safetensors file, however large."""

    name: str
    about: str

    def lay_out(self, specs: Mapping[str, TensorSpec], max_nbytes: int) -> OutputFiles:
        header, offsets, nbytes = safetensors.layout(specs, {KEY: self.about})
        return OutputFiles((OutputFile(self.name, nbytes, offsets, ((0, header),)),))


Parts = Mapping[str, Mapping[str, Lazy]]


def _own(ckpt: Checkpoint, parts: Parts, samples: Samples, rows: Sequence[Sequence[int]], name: str) -> Checkpoint:
    about = {"tokens": len(rows) * len(rows[0]), **samples.attrs()}
    tensors = {f"{weight}.{field}": lazy for weight, fields in parts.items() for field, lazy in fields.items()}
    return ckpt.derive(tensors=tensors, config={}, files={}, container=_OneFile(name, json.dumps(about)))


def _by_gguf_name(ckpt: Checkpoint, parts: Parts) -> dict[str, Lazy]:
    """The sums of squares by the names that tensors have in GGUF files."""
    slots = gguf_spelling(ckpt, ckpt.require_model()).slots.values()
    if any(slot.stack for slot in slots):
        raise RequirementError(
            f"{ckpt.label}: llama.cpp's importance matrices count the tokens of each expert, which are not measured",
            hint="-o NAME.safetensors; `convert --to gguf` takes it, too",
        )
    pairs = [(slot.name, next((part.id for part in slot.parts if part.id in parts), None)) for slot in slots]
    return {name: parts[weight]["squares"] for name, weight in pairs if weight is not None}


def _gguf(ckpt: Checkpoint, parts: Parts, samples: Samples, rows: Sequence[Sequence[int]], name: str) -> Checkpoint:
    sums, tensors = _by_gguf_name(ckpt, parts), dict[str, Lazy]()
    count = torch.full((1, 1), float(len(rows) * len(rows[0])))
    for tensor, lazy in sums.items():
        tensors[tensor + imatrix.SUMS] = reshape(lazy, (1, *lazy.shape))
        tensors[tensor + imatrix.COUNTS] = constant(count)
    channels = {tensor: lazy.shape[0] for tensor, lazy in sums.items()}
    container = imatrix.gguf_container(name, channels, samples.label, n_samples=len(rows), length=len(rows[0]))
    return ckpt.derive(tensors=tensors, config={}, files={}, container=container)


def _binary(ckpt: Checkpoint, parts: Parts, samples: Samples, rows: Sequence[Sequence[int]], name: str) -> Checkpoint:
    sums, length = _by_gguf_name(ckpt, parts), len(rows[0])

    def mean_times_calls(lazy: Lazy) -> Lazy:
        return Apply("mean", [lazy], lazy.spec, lambda x: x / length, {"tokens": length}).output()

    channels = {tensor: lazy.shape[0] for tensor, lazy in sums.items()}
    container = imatrix.binary_container(name, channels, samples.label, n_samples=len(rows))
    tensors = {tensor: mean_times_calls(lazy) for tensor, lazy in sums.items()}
    return ckpt.derive(tensors=tensors, config={}, files={}, container=container)


_WRITERS = {".safetensors": _own, ".gguf": _gguf, ".dat": _binary}
