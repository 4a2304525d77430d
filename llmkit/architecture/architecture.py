"""An architecture as data, and its binding to one config."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llmkit.architecture.gguf import GgufFamily
from llmkit.architecture.keys import Computed, Key, absent, as_float, as_key, is_null, lookup, source_of
from llmkit.architecture.kind import Kind
from llmkit.architecture.kinds import Block, Embedding, Head, PerLayer
from llmkit.architecture.model import Model
from llmkit.architecture.names import Names
from llmkit.architecture.prompts import Prompt
from llmkit.architecture.sizes import Sizes
from llmkit.architecture.tokenizers import TokenizerKind
from llmkit.architecture.unread import RecordedConfig, unread_keys
from llmkit.errors import PluginError, SpecError

Size = str | Key | Computed
DERIVED = Key((), None)
"""For `kv_heads` and `head_dim` of a family whose configs state neither: heads, and hidden / heads."""
HIDDEN_PER_HEAD = Computed(lambda config: config["hidden_size"] // config["num_attention_heads"])
"""For `head_dim` in `fixed`, where transformers 5 makes rotary positions of that key, and heads of this width."""
NULL: Any = object()
"""In a variant of a tiny model: null in its config.json."""
READ_SINCE_5 = "transformers 4 does not read {} of this class from compressed-tensors: transformers 5 does"
NOT_IN_GGUF = "llama.cpp does not know it"
_KV_HEADS = Key("num_key_value_heads", None)
_HEAD_DIM = Key("head_dim", None)
_CONTEXT = Key("max_position_embeddings", None)
# Sizes are believed before the tensors are looked at: bounds far beyond any model keep the lists made of them small.
_LARGEST = {"layers": 10_000, "heads": 100_000, "kv_heads": 100_000}
LARGEST_SIZE = 2**48
_TINY_SIZES = {"hidden": 32, "layers": 2, "heads": 4, "ffn": 48, "vocab": 96}


@dataclass(frozen=True)
class Dims:
    """Which config keys hold the sizes; by default the usual ones. A string is a required key, a `Key` may be absent.

    Attributes:
        kv_heads: absent in a config means as many as heads.
        head_dim: absent in a config means hidden / heads.
        context: the longest sequence it was trained for, in tokens; absent means unknown.
        extra: sizes of the family's own, which shape formulas may name.
    """

    hidden: Size = "hidden_size"
    layers: Size = "num_hidden_layers"
    heads: Size = "num_attention_heads"
    ffn: Size = "intermediate_size"
    vocab: Size = "vocab_size"
    kv_heads: Size = _KV_HEADS
    head_dim: Size = _HEAD_DIM
    context: Size = _CONTEXT
    extra: Mapping[str, Size] = field(default_factory=dict)

    def bind(self, config: Mapping[str, Any]) -> Sizes:
        """The sizes as whole numbers.

        Raises:
            SpecError: a key is absent, not a positive whole number, or heads do not divide.
        """
        bound: dict[str, int | None] = {}
        keys: dict[str, str] = {}
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context"):
            key = as_key(getattr(self, name))
            is_derived = name in ("kv_heads", "head_dim") and is_null(key, config)
            bound[name] = None if is_derived else _whole(name, key, config)
            keys[name] = source_of(key, config) or next(iter(key.spellings), name)
        context = bound.pop("context")
        hidden, heads = bound["hidden"] or 0, bound["heads"] or 0
        if bound["kv_heads"] is None:
            bound["kv_heads"], keys["kv_heads"] = heads, keys["heads"]
        if bound["head_dim"] is None:
            if hidden % heads:
                raise SpecError(
                    f"config.json: {keys['hidden']} {hidden} is not a multiple of {keys['heads']} {heads}",
                    hint=f"a model with another head size states it as {keys['head_dim']!r}",
                )
            bound["head_dim"], keys["head_dim"] = hidden // heads, f"{keys['hidden']}/{keys['heads']}"
        sizes = {name: value or 0 for name, value in bound.items()}
        if heads % sizes["kv_heads"]:
            raise SpecError(
                f"config.json: {keys['heads']} {heads} is not a multiple of {keys['kv_heads']} {sizes['kv_heads']}"
            )
        extra = {name: _whole(name, as_key(key), config) or 0 for name, key in self.extra.items()}
        keys |= {name: source_of(as_key(key), config) or name for name, key in self.extra.items()}
        return Sizes(**sizes, context=context, extra=extra, keys=keys)


def _whole(name: str, key: Key | Computed, config: Mapping[str, Any]) -> int | None:
    value = lookup(key, config)
    if value is None:
        return None
    where = source_of(key, config) or next(iter(key.spellings), name)
    largest = _LARGEST.get(name, LARGEST_SIZE)
    size = as_float(value, where) if isinstance(value, float) else value
    if isinstance(size, bool) or not isinstance(size, int | float) or size != int(size) or not 1 <= size <= largest:
        limit = f" up to {largest:,}" if isinstance(size, int | float) and size > largest else ""
        raise SpecError(f"config.json: {where} is {value!r:.60}, expected a positive whole number{limit} ({name})")
    return int(size)


@dataclass(frozen=True)
class Architecture:
    """One decoder family, or one of its releases where they differ in more than numbers, as data.

    Attributes:
        name: a short name, as `plugins list` shows it.
        matches: the values of `architectures` in config.json that it claims; upper and lower case do not matter.
        releases: names of published models that it describes, as people know them.
        block: the kind of every layer, or `PerLayer` where they differ.
        embedding, head: what comes before and after the layers.
        final_norm: the norm before the head; None for one like the block's.
        model_types: the values of `model_type` that it claims where `architectures` is missing.
        when: tells the releases apart that state the same `architectures`: True for a config that is this one.
        tiny: the config of a tiny random model; sizes, `architectures` and `model_type` only where they are not the
            usual ones.
        variants: name -> changes to `tiny`, one for each thing that a config of the family can vary.
        prompt: the format that the family's chat models were tuned on; computed where its releases differ.
        tokenizer: how its tokenizer's file is read, where that was published with code of its own.
        equivalents: name of another architecture -> the config with which it is the same model.
        described_as: a config that transformers knows with the same sizes, for runtimes that read no more of it, where
            no other architecture is equivalent.
        optimum_reads: `model_type` -> the sizes (`head_dim`, `kv_heads`) that Optimum reads from such a config.
        prompt_suffix: ids that every prompt ends with, without which the model cannot be run.
        reference_attention: the implementation of attention with which transformers computes the family rightly.
        reference_config: a config that transformers does not know (of a release older than its class) in its words.
        gguf: how it looks in GGUF files; None for none.
        no_gguf: why there is none.
        loader_limits: end of the names of quantized tensors (`weight_packed`) -> the loader that does not find them.
        unadapted: last names of linear layers on which PEFT puts no adapter.
        fixed: keys of config.json that no kind reads and that change what the family's class computes: key -> the value
            that is computed (or where the config has it); another is refused.
        unused: patterns of keys that the class does not compute with (`unread.py` has those of all families).
    """

    name: str
    matches: tuple[str, ...]
    dims: Dims
    block: Kind | PerLayer
    names: Names
    tiny: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    releases: tuple[str, ...] = ()
    embedding: Embedding = field(default_factory=Embedding)
    head: Head = field(default_factory=Head)
    final_norm: Kind | Computed | None = None
    when: Callable[[Mapping[str, Any]], bool] | None = None
    prompt: Prompt | Computed | None = None
    tokenizer: TokenizerKind | None = None
    equivalents: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    described_as: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    prompt_suffix: Computed | tuple[int, ...] = ()
    reference_attention: str = "eager"
    reference_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    gguf: GgufFamily | None = None
    no_gguf: str = NOT_IN_GGUF
    optimum_reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    loader_limits: Mapping[str, str] = field(default_factory=dict)
    unadapted: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        usual: dict[str, Any] = {"architectures": list(self.matches[:1]), "model_type": "".join(self.model_types[:1])}
        for name, size in _TINY_SIZES.items():
            key = as_key(getattr(self.dims, name))
            if isinstance(key, Key) and key.spellings and not any(word in self.tiny for word in key.spellings):
                usual[key.spellings[0]] = size
        object.__setattr__(self, "tiny", {**usual, **self.tiny})

    def bind(self, config: Mapping[str, Any]) -> Model:
        """This architecture with the sizes and values of one config; `unread` is what is left of that.

        Raises:
            SpecError: the config lacks a key or contradicts itself.
        """
        seen = RecordedConfig(config)
        try:
            model = self._bound(seen)
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, KeyError) and isinstance(gone := error.args[0], str) and gone not in config:
                raise absent(gone, config) from error
            # What a plugin computes of a value that is none of its kind.
            key = next(reversed(seen.read), None)
            where = "" if key is None else f", the last key read: {key} is {seen.read[key]!r:.60}"
            raise SpecError(
                f"config.json: {self.name} cannot be made of it ({type(error).__name__}: {error}){where}",
                hint="config.json must be the one these weights were saved with",
            ) from error
        left = unread_keys(config, seen.read, fixed=self.fixed, unused=self.unused, family=self.name)
        return _shared(replace(model, unread=left))

    def _bound(self, config: RecordedConfig) -> Model:
        dims = self.dims.bind(config)
        if isinstance(self.block, PerLayer):
            blocks = tuple(self.block.of(config, i).bind(config) for i in range(dims.layers))
        else:
            blocks = (self.block.bind(config),) * dims.layers
        first = blocks[0]
        norm = self.final_norm.bind(config) if self.final_norm is not None else None
        if norm is None:
            if not isinstance(first, Block):
                raise PluginError(f"architecture {self.name!r}: a block of another kind needs a final_norm of its own")
            norm = first.norm
        return Model(
            family=self.name,
            dims=dims,
            embedding=self.embedding.bind(config),
            blocks=blocks,
            final_norm=norm,
            head=self.head.bind(config),
            names=self.names,
        )

    def prompt_suffix_of(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The ids that every prompt of one config ends with."""
        suffix = self.prompt_suffix.bind(config) if isinstance(self.prompt_suffix, Computed) else self.prompt_suffix
        return tuple(suffix)

    def prompt_of(self, config: Mapping[str, Any]) -> Prompt | None:
        """The prompt format of one config."""
        prompt: Prompt | None = self.prompt.of(config) if isinstance(self.prompt, Computed) else self.prompt
        return prompt

    @cached_property
    def stems_of_layers(self) -> frozenset[str]:
        """Stems of the weights that a layer of a tiny model has (`attn.q`)."""
        models = [self.bind(self.tiny_config(variant)) for variant in (None, *self.variants)]
        return frozenset(leaf.rpartition(".")[0] for model in models for leaf in model.block.slots())

    def tiny_config(self, variant: str | None = None) -> dict[str, Any]:
        """The config of the tiny model, or of one of its variants; None takes a key away, NULL states null."""
        changes = self.variants[variant] if variant is not None else {}
        # Classes of transformers add defaults to the rotary parameters that they are given.
        return {k: None if v is NULL else deepcopy(v) for k, v in {**self.tiny, **changes}.items() if v is not None}


_RECENT: deque[Model] = deque(maxlen=4)


def _shared(model: Model) -> Model:
    """An equal model that was bound before, with the slots it has made: a new dtype in a config changes none."""
    known = next((recent for recent in _RECENT if recent == model), None)
    if known is None:
        _RECENT.append(model)
    return known or model
