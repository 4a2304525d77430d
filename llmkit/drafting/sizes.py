"""Which key of config.json holds which size: told by its name and by the shapes that it must give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["HARMLESS", "Config"]

# Keys that do not change what is computed.
HARMLESS = (
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path",
    "use_cache", "initializer_range", "auto_map", "tokenizer_class", "quantization_config", "return_dict",
    "output_hidden_states", "output_attentions", "is_decoder", "pretraining_tp", "task_specific_params", "id2label",
    "label2id", "num_labels", "pruned_heads", "torchscript", "gradient_checkpointing", "max_length", "prefix",
)  # fmt: skip
_HARMLESS_PARTS = (
    "_token_id",
    "dropout",
    "_pdrop",
    "layerdrop",
    "_drop",
    "init",
    "summary_",
    "token_ids",
    "name_or_path",
)

_WORDS = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "n_embed", "model_dim", "embed_dim", "hidden_dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "n_blocks", "depth"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "multi_query_group_num", "n_kv"),
    "head_dim": ("head_dim", "kv_channels", "d_head", "head_size", "attention_head_dim"),
    "ffn": ("intermediate_size", "ffn_hidden_size", "inner_hidden_size", "n_inner", "ffn_dim", "d_ff", "d_inner",
            "ffn_hidden", "feed_forward_size", "hidden_dim", "mlp_dim"),
    "vocab": ("vocab_size", "padded_vocab_size", "n_vocab", "num_embeddings"),
    "context": ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "model_max_length",
                "n_ctx", "context_length", "max_seq_len", "max_seq_length", "block_size"),
    "eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon",
            "rms_norm_epsilon", "layernorm_eps", "ln_eps"),
    "act": ("hidden_activation", "hidden_act", "activation_function", "activation", "act_fn", "hidden_activation_fn"),
    "theta": ("rope_theta", "rotary_emb_base", "rope_base", "rotary_base"),
    "share": ("partial_rotary_factor", "rotary_pct", "rope_pct", "rope_percent"),
    "rotary_dim": ("rotary_dim", "rotary_dims", "rope_dim"),
    "tied": ("tie_word_embeddings", "tie_embeddings"),
}  # fmt: skip
# A key that no list knows is taken when its value fits and its name has one of these words in it.
_PARTS = {
    "hidden": ("hidden", "embd", "embed", "model", "dim", "width"),
    "layers": ("layer", "block", "depth"),
    "heads": ("head",),
    "kv_heads": ("kv", "group", "head"),
    "head_dim": ("head", "channel"),
    "ffn": ("ff", "inner", "intermediate", "mlp", "hidden", "feed"),
    "vocab": ("vocab",),
    "eps": ("eps",),
    "act": ("activation", "hidden_act", "act_fn"),
    "theta": ("rope_theta", "rope_base", "rotary"),
}


@dataclass
class Config:
    """The config with a note of what has been used.

    Attributes:
        used: size or value -> the key that it was found under.
    """

    values: Mapping[str, Any]
    used: dict[str, str] = field(default_factory=dict)

    def find(self, name: str, value: Any = None) -> str | None:
        """The key of a size; `value` is what the shapes say, None when they say nothing."""
        keys = [k for k in _WORDS[name] if k in self.values]
        keys += [k for k in self.values if k not in keys and any(part in k.lower() for part in _PARTS.get(name, ()))]
        for key in keys:
            found = self.values[key]
            is_right = (value is None and key in (*_WORDS[name], *self._plausible(name))) or (
                value is not None and found == value and not isinstance(found, bool)
            )
            if found is not None and is_right and key not in self.used.values():
                self.used[name] = key
                return key
        return None

    def _plausible(self, name: str) -> list[str]:
        kind: tuple[type, ...] = {"eps": (float,), "act": (str,), "theta": (int, float)}.get(name, ())
        return [k for k, v in self.values.items() if kind and isinstance(v, kind) and not isinstance(v, bool)]

    def has(self, *parts: str) -> Any:
        """The first true value of a key whose name has one of `parts` in it; None without one."""
        return next((v for k, v in self.values.items() if v and any(p in k.lower() for p in parts)), None)

    def unexplained(self) -> dict[str, Any]:
        """Keys that were not used and may change what is computed."""
        return {
            k: v
            for k, v in self.values.items()
            if k not in self.used.values()
            and k not in HARMLESS
            and not any(part in k for part in _HARMLESS_PARTS)
            and v is not None
        }
