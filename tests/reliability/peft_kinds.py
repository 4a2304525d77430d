"""The configurations of PEFT that the table goes through, as functions of what a model has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoHaConfig, LoKrConfig, LoraConfig, TrainableTokensConfig

__all__ = ["KINDS", "Facts", "Kind"]


@dataclass(frozen=True)
class Facts:
    """Of a model: last components of names of its linear layers, norms, ends and stacked parameters.

    Attributes:
        modules: whole paths of the linear layers.
    """

    linear: tuple[str, ...]
    attention: tuple[str, ...]
    modules: tuple[str, ...]
    norms: tuple[str, ...]
    embed: str
    head: str
    stacks: tuple[str, ...]
    is_conv1d: bool


@dataclass(frozen=True)
class Kind:
    """One configuration.

    Attributes:
        make: the config for a model; None where it does not apply.
        dtype: of the base.
        is_refused: llmkit says that it cannot be merged, and why.
        is_converted: the initialisation that PEFT converts away when it saves.
    """

    name: str
    make: Callable[[Facts], Any]
    dtype: torch.dtype = torch.float32
    is_refused: bool = False
    is_converted: str = ""


def _lora(**options: Any) -> Callable[[Facts], Any]:
    """LoRA on all linear layers; values that are functions get the facts."""

    def make(f: Facts) -> Any:
        given: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": list(f.linear), **options}
        given = {k: v(f) if callable(v) else v for k, v in given.items()}
        return None if any(v is None for v in given.values()) else LoraConfig(**given)

    return make


def _of(cls: Any, **options: Any) -> Callable[[Facts], Any]:
    def make(f: Facts) -> Any:
        given: dict[str, Any] = {"target_modules": list(f.linear), **options}
        return cls(**{k: v(f) if callable(v) else v for k, v in given.items()})

    return make


def _named(name: str, **options: Any) -> Callable[[Facts], Any]:
    """A type that this version of PEFT may not have."""
    cls = getattr(peft, f"{name}Config", None)
    return (lambda f: None) if cls is None else _of(cls, **options)


def _plain(cls: Any, **options: Any) -> Callable[[Facts], Any]:
    return lambda f: cls(task_type="CAUSAL_LM", **options)


def first(f: Facts) -> list[str]:
    return [f.attention[0]]


def embed(f: Facts) -> list[str]:
    return [f.embed, f.attention[0]]


def head(f: Facts) -> Any:
    return [f.head, f.attention[0]] if f.head else None


def both(f: Facts) -> Any:
    return [f.embed, f.head, f.attention[0]] if f.head else None


def ends(f: Facts) -> Any:
    return [f.embed, f.head] if f.head else None


_BF16, _F16 = torch.bfloat16, torch.float16
_FREE = {"target_modules": first}
KINDS: tuple[Kind, ...] = (
    Kind("lora", _lora()),
    Kind("lora bfloat16", _lora(), _BF16),
    Kind("lora float16", _lora(), _F16),
    Kind("lora r=1", _lora(r=1, lora_alpha=1)),
    Kind("lora r=16", _lora(r=16, lora_alpha=11)),
    Kind("lora power of two", _lora(r=4, lora_alpha=8)),
    Kind("lora of one layer type", _lora(target_modules=first)),
    Kind("lora of attention", _lora(target_modules=lambda f: list(f.attention))),
    Kind("lora gaussian", _lora(init_lora_weights="gaussian")),
    Kind("lora random", _lora(init_lora_weights=False)),
    Kind("lora orthogonal", _lora(r=4, init_lora_weights="orthogonal")),
    Kind("lora mica", _lora(init_lora_weights="mica")),
    Kind("lora mica float16", _lora(init_lora_weights="mica"), _F16),
    Kind("rslora", _lora(use_rslora=True)),
    Kind("rslora bfloat16", _lora(use_rslora=True), _BF16),
    Kind("dora", _lora(use_dora=True)),
    Kind("dora bfloat16", _lora(use_dora=True), _BF16),
    Kind("dora float16", _lora(use_dora=True), _F16),
    Kind("dora, rslora", _lora(use_dora=True, use_rslora=True)),
    Kind("rank_pattern", _lora(rank_pattern=lambda f: {f.attention[0]: 2})),
    Kind("alpha_pattern", _lora(alpha_pattern=lambda f: {f.attention[0]: 7})),
    Kind(
        "patterns by regex",
        _lora(
            rank_pattern=lambda f: {rf".*\.1\..*{f.attention[0]}": 2, f"^{f.modules[0]}": 5},
            alpha_pattern=lambda f: {rf"^.*\.0\..*{f.linear[-1]}$": 9},
        ),
    ),
    Kind("patterns, rslora", _lora(use_rslora=True, rank_pattern=lambda f: {f.linear[-1]: 6})),
    Kind("layers_to_transform", _lora(layers_to_transform=[1])),
    Kind("layers_to_transform, a number", _lora(layers_to_transform=0)),
    Kind("modules_to_save head", _lora(target_modules=first, modules_to_save=lambda f: [f.head] if f.head else None)),
    Kind("modules_to_save embedding", _lora(target_modules=first, modules_to_save=lambda f: [f.embed])),
    Kind("modules_to_save both", _lora(target_modules=first, modules_to_save=ends)),
    Kind("modules_to_save both bfloat16", _lora(target_modules=first, modules_to_save=ends), _BF16),
    Kind("modules_to_save norms", _lora(target_modules=first, modules_to_save=lambda f: list(f.norms))),
    Kind("modules_to_save a linear layer", _lora(target_modules=first, modules_to_save=lambda f: [f.linear[-1]])),
    Kind("tokens", _lora(target_modules=first, trainable_token_indices=[7, 3, 20])),
    Kind("tokens bfloat16", _lora(target_modules=first, trainable_token_indices=[7, 3, 20]), _BF16),
    Kind("tokens of the embedding", _lora(target_modules=first, trainable_token_indices=lambda f: {f.embed: [1, 2]})),
    Kind(
        "tokens of both ends",
        _lora(
            target_modules=first, trainable_token_indices=lambda f: {f.embed: [0, 1], f.head: [5]} if f.head else None
        ),
    ),
    Kind("tokens, lora of the head", _lora(target_modules=head, trainable_token_indices=[4, 9])),
    Kind("bias all", _lora(bias="all")),
    Kind("bias lora_only", _lora(bias="lora_only")),
    Kind("lora_bias", _lora(lora_bias=True)),
    Kind("fan_in_fan_out", _lora(fan_in_fan_out=True)),
    Kind("exclude_modules", _lora(exclude_modules=lambda f: [f.linear[-1]] if len(f.linear) > 1 else None)),
    Kind("exclude by regex", _lora(exclude_modules=r".*\.0\..*")),
    Kind("target by regex", _lora(target_modules=lambda f: rf".*\.({f.attention[0]}|{f.linear[-1]})")),
    Kind("target by path", _lora(target_modules=lambda f: [f.modules[0], f.modules[-1]])),
    Kind("all-linear", _lora(target_modules="all-linear")),
    Kind("all-linear, dora", _lora(target_modules="all-linear", use_dora=True)),
    Kind("lora of the embedding", _lora(target_modules=embed)),
    Kind("lora of the embedding bfloat16", _lora(target_modules=embed), _BF16),
    Kind("lora of the head", _lora(target_modules=head)),
    Kind("lora of the head float16", _lora(target_modules=head), _F16),
    Kind("lora of both ends", _lora(target_modules=both)),
    Kind("dora of the embedding", _lora(target_modules=embed, use_dora=True)),
    Kind("dora of the head", _lora(target_modules=head, use_dora=True)),
    Kind("ensure_weight_tying, saved", _lora(target_modules=first, modules_to_save=ends, ensure_weight_tying=True)),
    Kind("ensure_weight_tying, lora", _lora(target_modules=both, ensure_weight_tying=True)),
    Kind(
        "target_parameters, plain",
        _lora(target_modules=[], target_parameters=lambda f: [f"{f.attention[0]}.weight"]),
    ),
    Kind("target_parameters, experts", _lora(target_modules=[], target_parameters=lambda f: list(f.stacks) or None)),
    Kind(
        "target_parameters bfloat16",
        _lora(target_modules=[], target_parameters=lambda f: list(f.stacks) or [f"{f.attention[0]}.weight"]),
        _BF16,
    ),
    Kind("pissa", _lora(init_lora_weights="pissa"), is_refused=True),
    Kind("pissa_niter_4", _lora(init_lora_weights="pissa_niter_4"), is_refused=True),
    Kind("pissa, converted", _lora(init_lora_weights="pissa"), is_converted="pissa"),
    Kind("olora", _lora(init_lora_weights="olora"), is_refused=True),
    Kind("olora, converted", _lora(init_lora_weights="olora"), is_converted="olora"),
    Kind("adalora", _of(AdaLoraConfig, init_r=6, target_r=3, lora_alpha=7, total_step=10)),
    Kind("adalora bfloat16", _of(AdaLoraConfig, init_r=6, target_r=3, lora_alpha=7, total_step=10), _BF16),
    Kind("loha", _of(LoHaConfig, r=3, alpha=5)),
    Kind("loha bfloat16", _of(LoHaConfig, r=3, alpha=5), _BF16),
    Kind("loha, patterns", _of(LoHaConfig, r=3, alpha=5, rank_pattern=lambda f: {f.attention[0]: 2})),
    Kind("lokr", _of(LoKrConfig, r=2, alpha=5)),
    Kind("lokr, both", _of(LoKrConfig, r=2, alpha=5, decompose_both=True)),
    Kind("lokr, factor", _of(LoKrConfig, r=2, alpha=5, decompose_factor=4)),
    Kind("lokr, whole", _of(LoKrConfig, r=64, alpha=5)),
    Kind("ia3", _of(IA3Config, target_modules=lambda f: list(f.linear), feedforward_modules=lambda f: [f.linear[-1]])),
    Kind("ia3 float16", _of(IA3Config, feedforward_modules=lambda f: [f.linear[-1]]), _F16),
    Kind("ia3, no inputs", _of(IA3Config, feedforward_modules=[])),
    Kind("norms", _of(LNTuningConfig, target_modules=lambda f: list(f.norms))),
    Kind("only tokens", _of(TrainableTokensConfig, target_modules=lambda f: [f.embed], token_indices=[2, 5])),
    Kind("layer_replication", _lora(layer_replication=[[0, 2], [1, 2]]), is_refused=True),
    Kind("alora", _lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"), is_refused=True),
    Kind("prompt tuning", _plain(peft.PromptTuningConfig, num_virtual_tokens=3), is_refused=True),
    Kind("prefix tuning", _plain(peft.PrefixTuningConfig, num_virtual_tokens=3), is_refused=True),
    Kind("p-tuning", _plain(peft.PromptEncoderConfig, num_virtual_tokens=3), is_refused=True),
    Kind("adaption prompt", _plain(peft.AdaptionPromptConfig, adapter_len=4, adapter_layers=1), is_refused=True),
    *(
        Kind(name.lower(), _named(name, **options), is_refused=True)
        for name, options in {
            "Vera": {"r": 4, **_FREE}, "PVera": {"r": 4, **_FREE}, "OFT": {"r": 0, "oft_block_size": 4, **_FREE},
            "BOFT": {"boft_block_size": 4, **_FREE}, "FourierFT": {"n_frequency": 20, **_FREE}, "HRA": _FREE,
            "VBLoRA": {"num_vectors": 8, "vector_length": 8, "topk": 2, **_FREE}, "RandLora": {"r": 4, **_FREE},
            "Road": _FREE, "Shira": {"r": 2, **_FREE}, "C3A": {"block_size": 8, **_FREE}, "Miss": {"r": 4, **_FREE},
            "WaveFT": {"n_frequency": 20, **_FREE}, "Lily": {"r": 4, **_FREE}, "Delora": {"r": 4, **_FREE},
            "Gralora": {"r": 4, **_FREE}, "Hira": {"r": 4, **_FREE}, "TinyLora": {"r": 2, **_FREE},
            "AdaMSS": {"r": 4, **_FREE}, "Beft": _FREE, "UniLora": {"r": 4, **_FREE}, "GLora": {"r": 4, **_FREE},
            "Peanut": {"r": 4, **_FREE}, "Psoft": {"r": 4, **_FREE}, "Frod": _FREE, "Deft": {"r": 4, **_FREE},
        }.items()
    ),
)  # fmt: skip
