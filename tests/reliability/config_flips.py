"""Every key of every family's config class, given another value one at a time: none that changes numbers goes unseen.

For each key of transformers' config class of the family, and each key that other families have, llmkit has to compute
transformers' logits, or refuse the config, or name the key; where transformers computes the same as without the key,
there is nothing to see.

    python tests/reliability/config_flips.py [FAMILY …] [--verbose]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from rotation import EVERY_WAY

from reliability.against_transformers import (
    PLUGINS,
    TOLERANCE,
    Outcome,
    Theirs,
    described,
    quietly,
    their_model,
    try_ours,
)

__all__ = ["FAMILIES", "FOREIGN", "Flip", "check_family", "flips_of"]

_OWN = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
# Where another class stands for remote code, its keys are checked with the family that it is of.
FAMILIES = [name for name, a in PLUGINS.items() if a.tiny["model_type"] in _OWN and described(a, a.tiny_config())]
# What is read of any config by modules that all families share (masks, rotary positions, layers of two sorts).
FOREIGN: dict[str, list[Any]] = {
    "is_causal": [False],
    "use_bidirectional_attention": [True],
    "rope_theta": [777.0],
    "rope_scaling": [{"rope_type": "linear", "factor": 3.0}],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 777.0}],
    "partial_rotary_factor": [0.5],
    "head_dim": [8],
    "sliding_window": [5],
    "layer_types": [["sliding_attention", "full_attention", "sliding_attention"]],
    "attention_chunk_size": [4],
    "attn_logit_softcapping": [0.5],
    "final_logit_softcapping": [0.5],
    "query_pre_attn_scalar": [3],
    "logit_scale": [0.5],
    "logits_scaling": [2.0],
    "embedding_multiplier": [2.0],
    "residual_multiplier": [0.5],
    "attention_multiplier": [0.5],
    "apply_residual_connection_post_layernorm": [True],
    "clip_qkv": [0.1],
    "attention_bias": [True],
    "mlp_bias": [True],
    "qk_layernorm": [True],
    "use_qk_norm": [True],
    "tie_word_embeddings": [True, False],
    "hidden_act": ["relu"],
    "hidden_activation": ["relu"],
    "activation_function": ["relu"],
    "num_key_value_heads": [1],
    "rotary_emb_base": [777],
    "rotary_pct": [0.5],
    "rotary_dim": [4],
    "alibi": [True],
    "scale_embedding": [True],
    "normalize_before": [True],
    "per_layer_config": [{"0": {"intermediate_size": 16}}],
    "no_rope_layers": [[0, 1, 0]],
    "attention_dropout": [0.5],
    "pretraining_tp": [2],
    "original_max_position_embeddings": [8],
}
_ROPES = ("rope_scaling", "rope_parameters")
_OF_SOME_TYPES = {
    "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": True, "low_freq_factor": 2.0,
    "high_freq_factor": 8.0, "original_max_position_embeddings": 16, "mrope_interleaved": False,
}  # fmt: skip
_MEMBERS = {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "factor": 4.0, "attention_factor": 1.5, **_OF_SOME_TYPES}
_ACTIVATIONS = ("relu", "quick_gelu")
_SKIPPED = ("architectures", "model_type", "transformers_version", "vocab_size")
_OF_THE_OUTPUT = ("return_dict", "problem_type")  # another form of it, and a head of another task
# Of training, generation and other outputs.
_TOGETHER = (
    "output_hidden_states", "output_attentions", "output_router_logits", "chunk_size_feed_forward", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "attention_dropout", "resid_pdrop", "embd_pdrop",
    "router_aux_loss_coef", "pretraining_tp", "is_encoder_decoder", "max_position_embeddings", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Flip:
    """One key with another value, and what came of it."""

    path: str
    value: Any
    changes: bool
    outcome: Outcome

    @property
    def is_said(self) -> bool:
        """The key, or the object that it is in, is named."""
        said = " ".join(self.outcome.said) if self.path else ""
        return self.path in said or self.path.split(".")[0] in said

    @property
    def verdict(self) -> str:
        if self.outcome.is_equal:
            return "equal"
        if self.outcome.refusal is not None:
            return "refused" if self.changes else "refused needlessly"
        return "said" if self.is_said else "WRONG"


def check_family(name: str, *, short: bool = False) -> Iterator[Flip]:
    """All flips of one family, and what llmkit makes of them.

    `short`: one of each key's values (see `_few`), and of most families one variant beside the tiny config.
    """
    architecture = PLUGINS[name]
    tiny = architecture.tiny_config()
    config = {**_defaults(tiny), **tiny}
    cases = [(config, list(flips_of(config)))]
    variants = list(architecture.variants.items())
    if short and name not in EVERY_WAY:
        variants = variants[FAMILIES.index(name) % max(len(variants), 1) :][:1]
    for variant, changes in variants:
        cases.append((architecture.tiny_config(variant), list(flips_of(changes, foreign=False))))
    for config, flips in cases:
        flips = list(_few(flips, config, FAMILIES.index(name))) if short else flips
        yield from _checked(name, config, flips, short=short)


def _few(flips: list[tuple[str, Any]], config: Mapping[str, Any], start: int) -> Iterator[tuple[str, Any]]:
    """One value of each key, of keys that only other families have every 24th; other ones for each family."""
    values: dict[str, list[Any]] = {}
    for path, value in flips:
        values.setdefault(path, []).append(value)
    for i, (path, own) in enumerate(values.items(), start):
        if path in config or path not in FOREIGN or i % 24 == 0:
            yield path, own[i % len(own)]


def _unlikely(flips: list[tuple[str, Any]], config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Batches of keys that hardly matter: changed together first, and one at a time only where that is seen.

    Those of `_TOGETHER`, and what most types of rotary positions have no use for.
    """
    yield {p: value for p, value in flips if p in _TOGETHER and (p != "pad_token_id" or type(value) is int)}
    for outer in _ROPES:
        unstated = {f"{outer}.{member}" for member in _OF_SOME_TYPES.keys() - (config.get(outer) or {}).keys()}
        if batch := {path: value for path, value in flips if path in unstated}:
            yield batch


def _is_unseen(name: str, changed: dict[str, Any], base: Theirs, folder: Path) -> bool:
    """Whether both compute with another config what transformers does with the first one."""
    try:
        theirs = their_model(_theirs(name, changed), PLUGINS[name].reference_attention, like=base)
    except Exception:  # noqa: BLE001 - one of the values is refused, in whatever form
        return False
    return not _differ(base, theirs) and try_ours(theirs, changed, folder).is_equal


def _checked(name: str, config: dict[str, Any], flips: list[tuple[str, Any]], *, short: bool) -> Iterator[Flip]:
    attention = PLUGINS[name].reference_attention
    with quietly(), tempfile.TemporaryDirectory() as folder:
        try:
            base = their_model(_theirs(name, config), attention)
        except ValueError:  # a config of older releases that today's class refuses
            return
        outcome = try_ours(base, config, Path(folder) / "base")
        yield Flip("", None, False, outcome)
        flips = [flip for flip in flips if flip[0] not in _OF_THE_OUTPUT]
        for batch in _unlikely(flips, config) if short else ():
            changed = config
            for path, value in batch.items():
                changed = _with(changed, path, value)
            if _is_unseen(name, changed, base, Path(folder) / "together"):
                flips = [flip for flip in flips if flip[0] not in batch]
        for i, (path, value) in enumerate(flips):
            changed = _with(config, path, value)
            try:
                theirs = their_model(_theirs(name, changed), attention, like=base)
            except Exception:  # noqa: BLE001 - transformers' own refusal, in whatever form
                continue
            if not torch.isfinite(theirs.logits).all():
                continue
            yield Flip(path, value, _differ(base, theirs), try_ours(theirs, changed, Path(folder) / str(i)))


def _theirs(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    found = described(PLUGINS[name], config)
    assert found is not None
    return found


def _defaults(tiny: Mapping[str, Any]) -> dict[str, Any]:
    """What the class states beyond the tiny config, as it would be saved."""
    made = transformers.AutoConfig.for_model(**dict(tiny))
    stated = made.to_dict()
    aliases = {v for k, v in type(made).attribute_map.items() if k in tiny}
    return {k: v for k, v in stated.items() if k not in aliases and not k.startswith("_") and k not in _RENAMED}


_RENAMED = ("rope_parameters", "dtype")  # today's names of what the tiny configs state in the older way


def flips_of(config: Mapping[str, Any], *, foreign: bool = True) -> Iterator[tuple[str, Any]]:
    """Path of a key and another value, one at a time."""
    for key, value in config.items():
        if key not in _SKIPPED:
            yield from ((key, other) for other in _others(value))
    for outer in _ROPES:
        rope = config.get(outer)
        if isinstance(rope, Mapping):
            for key, value in {**_MEMBERS, **rope}.items():
                yield from ((f"{outer}.{key}", other) for other in _others(value))
    for alias in _aliases(config):
        yield from ((alias, other) for other in _others(config.get(alias, config.get(_aliases(config)[alias]))))
    if foreign:
        for key, values in FOREIGN.items():
            yield from ((key, value) for value in values if config.get(key) != value)


def _aliases(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Other names of the class for its own keys."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    stated = config.get("model_type")
    return known[stated].attribute_map if stated in known else {}


def _others(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value, None]
        case int():
            return [value * 2, max(1, value // 2), value + 1]
        case float():
            return [value * 2, value / 2, value + 0.05, 0.25]
        case str():
            return [a for a in _ACTIVATIONS if a != value]
        case None:
            return [True, 2, 0.25]
        case _:
            return []


def _with(config: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    inner = _with(config.get(key) or {}, rest, value) if rest else value
    return {**config, key: inner}


def _differ(a: Theirs, b: Theirs) -> bool:
    if {k: v.shape for k, v in a.tensors.items()} != {k: v.shape for k, v in b.tensors.items()}:
        return True
    if a.logits.shape != b.logits.shape:
        return True
    return float((a.logits - b.logits).abs().max()) > TOLERANCE


def main() -> int:
    """Print what is not as it should be; 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", default=FAMILIES)
    parser.add_argument("--verbose", action="store_true", help="every flip, not only those to look at")
    args = parser.parse_args()
    counts: dict[str, int] = {}
    for name in args.family or FAMILIES:
        for flip in check_family(name):
            counts[flip.verdict] = counts.get(flip.verdict, 0) + 1
            if args.verbose or flip.verdict in ("WRONG", "refused needlessly") or (flip.verdict == "said"):
                print(f"{name}: {flip.path}={flip.value!r}: {flip.verdict}, changes {flip.changes}: {flip.outcome}")
    print(counts)
    return int("WRONG" in counts)


if __name__ == "__main__":
    sys.exit(main())
