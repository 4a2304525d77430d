"""Which keys of a config the kinds read, and what to do about the others.

While an architecture is bound, the config is seen through a view that notes every key that is asked for. A key that is
left may change what the family's class computes. It is one of four:

- known to change nothing: bookkeeping, training, generation (here), or unused by the class (`Architecture.unused`);
- known to change the numbers, with the value that the kinds compute (here and `Architecture.fixed`): nothing to say;
- the same with another value: the config describes another model than the one that would be computed, and is refused;
- unknown: said by every command that computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from typing import Any

from llmkit.architecture.keys import Computed, Key, lookup
from llmkit.errors import RequirementError, listing

# Values that the kinds compute whatever the family; transformers' masks look at this key of any config.
_FIXED: Mapping[str, Any] = {"is_causal": True}
# What other families compute with, at the values that change nothing.
_NEUTRAL: Mapping[str, Any] = {
    "use_sliding_window": False, "use_mrope": False, "qk_layernorm": False, "use_qk_norm": False, "alibi": False,
    "rope_interleaved": False, "scale_embedding": False, "scale_embeddings": False, "use_parallel_residual": False,
    "parallel_attn": False, "apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False,
    "use_bidirectional_attention": False, "quantization_bit": 0, "logit_scale": 1, "logits_scaling": 1,
    "embedding_multiplier": 1, "residual_multiplier": 1, "num_experts": 0, "num_local_experts": 0,
}  # fmt: skip
_ANYTHING = object()
_HARMLESS = (
    # What the files are, who made them and how they are run.
    "_*", "architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version", "name_or_path",
    "quantization_config", "compression_config", "tokenizer_class", "processor_class", "use_cache", "return_dict*",
    "output_*", "attn_implementation", "experts_implementation", "torchscript", "tf_legacy_loss", "use_bfloat16",
    "use_flash_attn*", "use_flash_attention*", "flash_attn*", "pretraining_tp", "gradient_checkpointing*",
    "use_gradient_checkpointing", "unsloth_*", "mlx_*", "is_llama_config", "cache_implementation", "custom_pipelines",
    "rope_*.type", "transformers.js_config", "model_name", "license", "base_model",
    # Ids are read by whoever makes or ends texts.
    "*_token_id", "*_token_ids", "*_token", "tokenizer_*", "chat_format", "chat_template", "prefix",
    # Training.
    "*dropout*", "*_pdrop", "initializer_range", "initializer_*", "init_std", "*_init_std", "layerdrop", "*_layerdrop",
    "label_smoothing*", "z_loss*", "router_aux_loss_coef", "finetuning_task", "lora_*", "training_*", "train_*",
    # Lengths are read where they are a size of the model.
    "max_sequence_length", "max_length", "min_length", "model_max_length", "max_seq_len", "max_seq_length",
    "seq_length", "max_position_embeddings", "context_length", "n_ctx", "n_positions", "tokenizer_model_max_length",
    # Generation.
    "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values",
    "repetition_penalty", "suppress_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_new_tokens",
    "renormalize_logits", "epsilon_cutoff", "eta_cutoff", "assistant_*",
    # Heads of other tasks, and of encoders.
    "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "summary_*", "classifier_*",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads",
    "chunk_size_feed_forward", "sep_token_id",
    # Biases are tensors: their presence is checked against the file.
    "attention_bias", "mlp_bias", "bias",
)  # fmt: skip


class RecordedConfig(Mapping[str, Any]):
    """A config that notes what is read of it.

    Attributes:
        read: path of a key (`rope_scaling.factor`) -> its value, the latest read last.
    """

    def __init__(self, config: Mapping[str, Any], read: dict[str, Any] | None = None, stem: str = "") -> None:
        self._config, self._stem = config, stem
        self.read: dict[str, Any] = {} if read is None else read

    def __getitem__(self, key: str) -> Any:
        path = self._stem + key
        self.read.pop(path, None)
        value = self._config[key]
        self.read[path] = value
        return RecordedConfig(value, self.read, f"{path}.") if isinstance(value, Mapping) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)

    def __repr__(self) -> str:
        return repr(self._config)


@dataclass(frozen=True, slots=True)
class Unread:
    """What no kind read of a config.

    Attributes:
        refused: keys with which the family's class computes something else, in words with what is computed here.
        unknown: paths of keys of which nothing is known.
    """

    refused: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to say of the unknown keys; nothing where there are none."""
        if not self.unknown:
            return ()
        them, they = ("it", "it changes") if len(self.unknown) == 1 else ("them", "they change")
        return (
            f"config.json: llmkit does not read {listing(self.unknown)}; if {they} what the model computes, "
            f"it is computed without {them} here",
        )

    def raise_if_refused(self, label: str) -> None:
        """Refuse to compute another model than the one that the config describes.

        Raises:
            RequirementError: a key is known to change the numbers.
        """
        if self.refused:
            raise RequirementError(
                f"{label}: config.json: {'; '.join(self.refused)}",
                hint="--backend transformers computes it with transformers' class; take the key out of config.json if "
                "the model was not trained so",
            )


def unread_keys(
    config: Mapping[str, Any],
    read: Mapping[str, Any],
    *,
    fixed: Mapping[str, Any],
    unused: tuple[str, ...],
    family: str,
) -> Unread:
    """The keys of a config that no kind read: those that must be refused, and those that are unknown.

    Args:
        read: paths that were read.
        fixed: path -> the one value that is computed, or where the config has it.
        unused: patterns of paths that the family's class does not compute with.
        family: for messages.
    """
    refused, unknown = [], []
    harmless = [_any_of(patterns) for patterns in (unused, _HARMLESS) if patterns]
    for path, value in _left(config, read, ""):
        wanted = {**_FIXED, **fixed}.get(path, _ANYTHING)
        if wanted is _ANYTHING and any(pattern.match(path) for pattern in harmless):
            continue
        wanted = lookup(wanted, config) if isinstance(wanted, Key | Computed) else wanted
        if wanted is _ANYTHING:
            if path not in _NEUTRAL or value != _NEUTRAL[path]:
                unknown.append(path)
        elif value != wanted:
            refused.append(f"{path} is {value!r:.60}, and {family} models are computed with {wanted!r}")
    return Unread(tuple(refused), tuple(unknown))


@cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """What a text that one of the patterns matches is matched by."""
    return re.compile("|".join(map(translate, patterns)))


def _left(config: Mapping[str, Any], read: Mapping[str, Any], stem: str) -> Iterator[tuple[str, Any]]:
    """Paths and values that were not read; null and what is empty state nothing."""
    for key, value in config.items():
        path = f"{stem}{key}"
        if isinstance(value, Mapping) and path in read:
            yield from _left(value, read, f"{path}.")
        elif path not in read and value is not None and value != {} and value != []:
            yield path, value
