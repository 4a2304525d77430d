"""The table of families in the documentation: what llmkit can do with each, tried out on its tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmkit.errors import LlmkitError, RequirementError
from llmkit.lazy_imports import torch
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    from llmkit.architecture.architecture import Architecture
    from llmkit.checkpoint.checkpoint import Checkpoint
    from llmkit.tensors.lazy import Lazy

_COLUMNS = ("plugin", "releases", "architectures", "decoder", "delta", "LoRA", "quantize", "ONNX", "GGUF", "prompts")
_NO = "-"
_OTHER_FORMAT = "gptq"  # whose loaders make linear layers of transposed ones


def families() -> str:
    """The table as markdown, a row for each built-in plugin."""
    from llmkit.architecture.registry import default_registry

    registry = default_registry()
    lines = [_row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    reasons: dict[str, list[str]] = {}
    for plugin in registry.plugins:
        if not plugin.is_builtin:
            continue
        architecture = registry.load(plugin)
        can = abilities(architecture)
        for verb, ability in can.items():
            for reason in ability.reasons:
                reasons.setdefault(f"{verb}: {reason}", []).append(f"`{plugin.name}`")
        for reason in dict.fromkeys(architecture.loader_limits.values()):
            reasons.setdefault(f"quantize: {reason}", []).append(f"`{plugin.name}`")
        names = [f"`{m}`" for m in architecture.matches]
        cells = [", ".join(architecture.releases), ", ".join(names), *(ability.cell for ability in can.values())]
        lines.append(_row([f"`{plugin.name}`", *cells, prompts(architecture)]))
    lines += ["", "What is not possible, and why:", ""]
    lines += [f"- {reason} ({', '.join(names)})" for reason, names in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Ability:
    """Whether something is possible with a family.

    Attributes:
        cell: yes, -, yes but for some variants of the tiny model, or the only format.
        reasons: what llmkit says where it is not.
    """

    cell: str
    reasons: tuple[str, ...] = ()


def abilities(architecture: Architecture) -> dict[str, Ability]:
    """What is possible with the tiny model and all its variants, by plans: no weight is read."""
    from llmkit.decoder.contract import random_checkpoint

    missing_by_probe: dict[str, dict[str, str]] = {name: {} for name in _PROBES}
    variants = (None, *architecture.variants)
    for variant in variants:
        config = architecture.tiny_config(variant)
        base, tuned = (random_checkpoint(architecture, config, seed=seed) for seed in (0, 1))
        for name, probe in _PROBES.items():
            try:
                probe(architecture, base, tuned)
            except LlmkitError as error:
                missing_by_probe[name][variant or "tiny"] = _without_subject(error.message, architecture)
    name_there = f"`{architecture.gguf.arch}`" if architecture.gguf is not None else _NO
    able = {
        name: _ability(missing, len(variants), yes=name_there if name == "GGUF" else "yes")
        for name, missing in missing_by_probe.items()
    }
    if able["quantize"].cell == _NO and _fits(architecture, _OTHER_FORMAT):
        able["quantize"] = replace(able["quantize"], cell=f"`{_OTHER_FORMAT}`")
    return able


def prompts(architecture: Architecture) -> str:
    """The names of the formats that the family's releases have; the tokenizer's own template comes first for all."""
    from llmkit.architecture.prompts import FORMATS

    names = {id(form): name for name, form in FORMATS.items()}
    forms = [architecture.prompt_of(architecture.tiny_config(v)) for v in (None, *architecture.variants)]
    formats = sorted({names[id(form)] for form in forms if id(form) in names})
    return ", ".join(formats) or "template"


def _ability(missing: Mapping[str, str], n_all: int, yes: str = "yes") -> Ability:
    reasons = tuple(dict.fromkeys(missing.values()))
    if len(missing) == n_all:
        return Ability(_NO, reasons)
    return Ability(f"{yes}, not {', '.join(missing)}" if missing else yes, reasons)


def _without_subject(message: str, architecture: Architecture) -> str:
    """A reason that may stand for several families."""
    subject, _, reason = message.partition(f" {architecture.name} model: ")
    return reason or subject


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _decoder(architecture: Architecture, base: Checkpoint, tuned: Checkpoint) -> None:
    from llmkit.decoder import load_decoder

    load_decoder(base, architecture=architecture)


def _delta(architecture: Architecture, base: Checkpoint, tuned: Checkpoint) -> None:
    from llmkit.transforms import delta

    delta.apply(base, delta.make(base, tuned))


def _lora(architecture: Architecture, base: Checkpoint, tuned: Checkpoint) -> None:
    """An adapter of rank 1 on every linear layer."""
    from llmkit.formats.adapter import Adapter
    from llmkit.tensors.lazy import Apply
    from llmkit.transforms.lora import merge

    def lazy(*shape: int) -> Lazy:
        return Apply("none", [], TensorSpec(DType.F32, shape), _unread, {}, row_step=None, output_rows=[0]).output()

    layers = [s for s in architecture.bind(base.config).slots.values() if s.kind == "linear" and not s.stack]
    modules = {}
    for slot in layers:
        out, inside = slot.shape[::-1] if slot.is_transposed else slot.shape
        modules[slot.name.removesuffix(".weight")] = {"lora_A": lazy(1, inside), "lora_B": lazy(out, 1)}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "fan_in_fan_out": any(s.is_transposed for s in layers)}
    merge(base, [Adapter("adapter", "LORA", config, modules, dict.fromkeys(modules, 1.0))])


def _quantize(architecture: Architecture, base: Checkpoint, tuned: Checkpoint) -> None:
    from llmkit.transforms.quantize import quantize

    quantize(base, bits=8)


def _fits(architecture: Architecture, format: str) -> bool:
    """Whether the tiny model can be quantized in another layout than the usual one."""
    from llmkit.decoder.contract import random_checkpoint
    from llmkit.transforms.quantize import quantize

    try:
        quantize(random_checkpoint(architecture, architecture.tiny_config()), bits=8, format=format)
    except LlmkitError:
        return False
    return True


def _onnx(architecture: Architecture, base: Checkpoint, tuned: Checkpoint) -> None:
    from llmkit.onnx.export import export

    export(base, weights="copy")


def _gguf(architecture: Architecture, base: Checkpoint, tuned: Checkpoint) -> None:
    from llmkit.transforms.convert.convert import convert

    if architecture.gguf is None:
        raise RequirementError(architecture.no_gguf)
    convert(base, to="gguf", type="f32")


def _unread() -> torch.Tensor:
    raise NotImplementedError  # pragma: no cover - plans read nothing


_PROBES: dict[str, Callable[[Architecture, Checkpoint, Checkpoint], None]] = {
    "decoder": _decoder, "delta": _delta, "LoRA": _lora, "quantize": _quantize, "ONNX": _onnx,
    "GGUF": _gguf,
}  # fmt: skip
