"""litgpt's checkpoints: `lit_model.pth` and model_config.yaml; rotary pairs as transformers has them.

q, k and v are one tensor: `attn.qkv` has all of q, then k, then v; before 2024's change it was `attn.attn`, which has
the queries of a key/value head, its key and its value, head after head.

Source: Lightning-AI/litgpt (litgpt/config.py, litgpt/scripts/convert_hf_checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.architecture import registry
from llmkit.architecture.keys import as_float
from llmkit.architecture.model import Model
from llmkit.architecture.names import Fused, Names, Transposed
from llmkit.architecture.positions import Rope
from llmkit.architecture.scaling import LinearScaling, Llama3Scaling
from llmkit.architecture.storage import tensors_of
from llmkit.errors import InputError
from llmkit.formats.text_file import read_yaml
from llmkit.formats.torch_zip import TorchNamedFiles
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.described import decoder_config, with_config_beside
from llmkit.layouts.layout import Layout, OpenedLayout, Spelling, WrittenLayout, commonest_dtype, to_hf, weights_for
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.spec import DType

NAME = "litgpt"
_FILE = "lit_model.pth"
_CONFIG = "model_config.yaml"
_OLD_CONFIG = "lit_config.json"
_NORM = "transformer.h.0.norm_1.weight"


def _spelling(qkv: Fused) -> Spelling:
    slots: dict[str, str | Fused | Transposed] = {"attn_norm": "norm_1", "attn.qkv": qkv, "attn.o": "attn.proj"}
    slots |= {"mlp_norm": "norm_2", "mlp.gate": "mlp.fc_1", "mlp.up": "mlp.fc_2", "mlp.down": "mlp.proj"}
    names = Names("transformer.wte", "transformer.ln_f", "lm_head", "transformer.h.{i}.", slots)
    return Spelling(names, "half")


_NEW = _spelling(Fused("attn.qkv", parts=("q", "k", "v")))
_OLD = _spelling(Fused("attn.attn", parts=("q", "k", "v"), rows="per_group"))
SPELLINGS = (_NEW, _OLD)
# What a model of this computation has to say, and what it means when it is not said.
_NEEDED: dict[str, tuple[Any, Any]] = {
    "norm_class_name": ("LayerNorm", "RMSNorm"), "mlp_class_name": ("GptNeoxMLP", "LLaMAMLP"),
    "rotary_percentage": (0.25, 1.0), "parallel_residual": (True, False), "bias": (True, False),
    "shared_attention_norm": (False, False), "scale_embeddings": (False, False), "lm_head_bias": (False, False),
    "sliding_window_size": (None, None), "norm_qk": (False, False), "post_attention_norm": (False, False),
    "post_mlp_norm": (False, False), "attn_bias": (False, False), "attention_logit_softcapping": (None, None),
    "final_logit_softcapping": (None, None), "rope_interleave": (False, False), "attention_scores_scalar": (None, None),
}  # fmt: skip


def find(candidate: Candidate) -> OpenedLayout | None:
    """What a folder of litgpt holds, or its lit_model.pth; None for anything else.

    Raises:
        InputError: no description beside the weights, one of another model, or of a computation that is not read.
    """
    if candidate.main is None or _NORM not in candidate.tensors:
        return None
    tensors = candidate.tensors
    spelling = next((s for s, name in ((_NEW, "qkv"), (_OLD, "attn")) if _qkv(name) in tensors), None)
    if spelling is None:
        return None
    where = str(candidate.main)
    config_name = next((name for name in (_CONFIG, _OLD_CONFIG) if name in candidate.names), None)
    if config_name is None:
        raise InputError(
            f"{where} is of litgpt, and no {_CONFIG} lies beside it", hint=f"copy {_CONFIG} of this model there"
        )
    config = _config(candidate, config_name, tensors)
    beside = with_config_beside(candidate, where, config)
    age = "" if spelling is _NEW else ", q, k and v interleaved by head as before 2024"
    chosen = beside if beside is not None else config
    notes = (f"read from litgpt's layout ({candidate.main.name} and {config_name}{age})",)
    own_files = (_CONFIG, _OLD_CONFIG, "hyperparameters.yaml")
    return OpenedLayout(NAME, to_hf(where, tensors, chosen, spelling), chosen, own=own_files, notes=notes)


def _qkv(name: str) -> str:
    return f"transformer.h.0.attn.{name}.weight"


def _config(candidate: Candidate, name: str, tensors: Mapping[str, Lazy]) -> dict[str, Any]:
    stated = candidate.json(name) if name.endswith(".json") else _yaml(candidate.folder / name)
    where = str(candidate.folder / name)
    for key, (default, wanted) in _NEEDED.items():
        value = stated.get(key, default)
        if key == "attention_scores_scalar" and value == stated.get("head_size"):
            continue
        if value != wanted and not (value is None and not wanted):
            raise InputError(
                f"{where}: {key} is {value!r}; of litgpt's models those with {wanted!r} are read",
                hint="convert it to transformers' layout with litgpt",
            )
    embedding = tensors.get("transformer.wte.weight")
    adjusted = stated.get("rope_adjustments")
    condensed = stated.get("rope_condense_ratio") or 1
    scaling = None if condensed == 1 else {"rope_type": "linear", "factor": float(condensed)}
    try:
        if adjusted:
            scaling = {
                "rope_type": "llama3",
                "factor": float(adjusted["factor"]),
                "low_freq_factor": float(adjusted["low_freq_factor"]),
                "high_freq_factor": float(adjusted["high_freq_factor"]),
                "original_max_position_embeddings": int(adjusted["original_max_seq_len"]),
            }
        return decoder_config(
            hidden=stated["n_embd"],
            ffn=stated["intermediate_size"],
            layers=stated["n_layer"],
            heads=stated["n_head"],
            kv_heads=stated.get("n_query_groups"),
            head_dim=stated.get("head_size"),
            vocab=embedding.spec.n_rows if embedding is not None else stated["padded_vocab_size"],
            eps=stated.get("norm_eps", 1e-5),
            theta=float(stated.get("rope_base", 10000)),
            scaling=scaling,
            context=stated["block_size"],
            dtype=commonest_dtype(tensors),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: missing or malformed: {error}", hint=f"give the {name} of this model") from error


def _yaml(path: Path) -> dict[str, Any]:
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected keys and values, found {type(settings).__name__}", hint="copy it again")
    return settings


def write(tensors: Mapping[str, Lazy], config: Mapping[str, Any]) -> WrittenLayout:
    """A checkpoint as litgpt stores it (the layout since 2024).

    Raises:
        RequirementError: a model that litgpt's settings, as far as they are read here, cannot describe.
    """
    import yaml

    plain = registry.require_model(config, f"--to {NAME}")
    settings, scaling = _settings(plain)
    d = plain.dims
    described = decoder_config(
        hidden=d.hidden, ffn=d.ffn, layers=d.layers, heads=d.heads, kv_heads=d.kv_heads, head_dim=d.head_dim,
        vocab=d.vocab, eps=settings["norm_eps"], theta=settings["rope_base"], scaling=scaling,
        context=settings["block_size"], dtype=DType.F32,
    )  # fmt: skip
    model, weights = weights_for(NAME, tensors, config, described, _NEW)
    weights.setdefault("head.weight", weights["embed.weight"])
    stored = tensors_of(weights, model.spelled(_NEW.names))
    text = yaml.safe_dump(settings, sort_keys=True)
    return WrittenLayout(stored, TorchNamedFiles({_FILE: [(n, n) for n in stored]}), {_CONFIG: text.encode()})


def _settings(model: Model) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What litgpt's Config takes, and the scaling of positions among it as transformers says it."""
    d = model.dims
    position = getattr(model.block, "position", None)
    theta = as_float(position.theta) if isinstance(position, Rope) else 10000.0
    settings: dict[str, Any] = {
        "name": "converted", "hf_config": {}, "block_size": d.context or 2048, "vocab_size": d.vocab,
        "padded_vocab_size": d.vocab, "padding_multiple": 1, "n_layer": d.layers, "n_head": d.heads,
        "n_query_groups": d.kv_heads, "head_size": d.head_dim, "n_embd": d.hidden, "intermediate_size": d.ffn,
        "norm_eps": float(getattr(model.final_norm, "eps", 1e-5)), "rope_base": int(theta),
    }  # fmt: skip
    settings |= {key: wanted for key, (default, wanted) in _NEEDED.items() if wanted != default}
    scaling: dict[str, Any] | None = None
    rope = position.bound_scaling if isinstance(position, Rope) else None
    if isinstance(rope, Llama3Scaling):
        factors = {
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
        settings["rope_adjustments"] = {**factors, "original_max_seq_len": rope.original_max_position}
        scaling = {"rope_type": "llama3", **factors, "original_max_position_embeddings": rope.original_max_position}
    elif isinstance(rope, LinearScaling) and rope.factor == int(rope.factor):
        settings["rope_condense_ratio"] = int(rope.factor)
        scaling = {"rope_type": "linear", "factor": rope.factor}
    return settings, scaling


LAYOUT = Layout(NAME, find, write, "litgpt's lit_model.pth and model_config.yaml", spellings=SPELLINGS)
