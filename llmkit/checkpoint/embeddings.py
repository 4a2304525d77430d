"""Embedding and output head: one matrix or two. The one place that decides it.

A config says whether the two are tied, and says it wrongly where a tool set the key, or a family's default holds and
the head was trained on its own. What the files hold decides, as in transformers 5: a head that is stored and is
another matrix than the embedding is the head, and the config is corrected when the checkpoint is opened, so that
whatever reads the config afterwards, or is written with it, has it right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmkit.architecture.keys import Key, as_bool, as_key, lookup, source_of
from llmkit.architecture.names import NameTable
from llmkit.checkpoint.class_embeddings import class_embeddings
from llmkit.checkpoint.order import sort_tensors
from llmkit.errors import InputError, PluginError, SpecError
from llmkit.lazy_imports import torch
from llmkit.tensors.equality import are_equal
from llmkit.tensors.lazy import Apply, Lazy

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint

_FLAG = "tie_word_embeddings"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embedding", "embeddings")
_HEADS = ("lm_head", "embed_out", "output_layer", "output", "proj_out", "decoder")


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The embedding and the output head of a checkpoint.

    Attributes:
        embed: tensor name of the embedding; None when it cannot be told.
        head: tensor name of the head, which a tied model need not store; None when it cannot be told.
        is_tied: the head is the embedding.
        shares: tensors that the model's class ties and the files need not hold -> the tensor whose values they have;
            the head of a tied model among them.
    """

    embed: str | None
    head: str | None
    is_tied: bool
    shares: Mapping[str, str] = field(default_factory=dict)


def find_embeddings(ckpt: Checkpoint) -> Embeddings:
    """Embedding and head of an opened checkpoint: by its architecture, else by transformers' class, else by name."""
    model = ckpt.model
    if model is not None:
        heads = [s.name for s in model.tensors().values() if s.kind == "head" and s.name.endswith("weight")]
        embed, head = model.name_of("embed.weight"), heads[0] if heads else None
        return Embeddings(embed, head, model.is_tied, {head: embed} if model.is_tied and head else {})
    by_class = class_embeddings(ckpt.config, ckpt.tensors)
    if by_class is not None:
        embed, head, shares = by_class
        is_stored = head in ckpt.tensors
        is_tied = head is not None and head in shares
        if is_tied and head is not None and is_stored:
            is_tied = bool(are_equal(ckpt.tensors[embed], ckpt.tensors[head]))
        return Embeddings(embed, head, is_tied, shares)
    embedding, head = _by_name(ckpt.tensors)
    if embedding is None:
        return Embeddings(None, head, False)
    stated = ckpt.config.get(_FLAG)
    is_tied = head is None if stated is None else bool(stated)
    if head is not None and is_tied:
        is_tied = bool(are_equal(ckpt.tensors[embedding], ckpt.tensors[head]))
    return Embeddings(embedding, head, is_tied, {head: embedding} if is_tied and head else {})


def with_true_tying(ckpt: Checkpoint, limit: int = 2**26) -> Checkpoint:
    """The checkpoint with a config that says of embedding and head what the files show.

    Where the config ties them and both are stored, their first bytes are compared, and the rest of very large ones
    when they are read. A head without an embedding is taken for both.

    Args:
        limit: at most this many bytes are read of each now.

    Raises:
        InputError: the family always ties, and the files hold another head.
    """
    try:
        tying = _config_tying(ckpt)
        is_tied = tying is not None and as_bool(tying.is_tied)
    except (PluginError, SpecError):  # whoever needs the architecture or the key will hear of it
        return ckpt
    if tying is None or not is_tied:
        return ckpt
    embed, head = ckpt.tensors.get(tying.embed), ckpt.tensors.get(tying.head)
    stem = tying.head.removesuffix("weight")
    is_packed = head is None and any(n.startswith(stem) and n != f"{stem}bias" for n in ckpt.tensors)
    if embed is None and head is not None and ckpt.origin is not None and ckpt.origin.is_dir():
        tensors = {tying.embed if n == tying.head else n: t for n, t in ckpt.tensors.items()}
        note = f"{tying.embed} is not stored: the head {tying.head}, to which the config ties it, is taken for it"
        return replace(ckpt, tensors=sort_tensors(tensors), notes=(*ckpt.notes, note))
    if embed is None or (head is None and not is_packed):
        return ckpt
    is_equal = False if head is None else are_equal(embed, head, limit)
    if is_equal:
        return ckpt
    if is_equal is None and head is not None:
        return replace(ckpt, tensors={**ckpt.tensors, tying.embed: _checked_equal(embed, head, tying, ckpt.label)})
    if tying.key is None:
        raise InputError(
            f"{ckpt.label}: {tying.head} is another matrix than the embedding {tying.embed}, and its family always "
            "ties the two",
            hint=f"a plugin whose head is tied by a key of config.json ({_FLAG}) can tell such files apart",
        )
    note = (
        f"{tying.head} is stored and is another matrix than the embedding, though the config ties them: it is the "
        f"head, and {tying.key} becomes false"
    )
    return replace(ckpt, config=_untied(ckpt.config, tying.key), notes=(*ckpt.notes, note))


def with_own_head(ckpt: Checkpoint) -> Checkpoint:
    """The checkpoint with its embedding once more as its head, and a config that does not tie them, where it does.

    Raises:
        SpecError: the config does not fit the architecture.
    """
    tying = _config_tying(ckpt)
    if tying is None or tying.key is None or not as_bool(tying.is_tied) or tying.embed not in ckpt.tensors:
        return ckpt
    tensors = sort_tensors({**ckpt.tensors, tying.head: ckpt.tensors[tying.embed]})
    return replace(ckpt, tensors=tensors, config=_untied(ckpt.config, tying.key))


@dataclass(frozen=True, slots=True)
class _ConfigTying:
    """What the config says: the names, whether they are tied, and by which key (None: by none)."""

    embed: str
    head: str
    is_tied: Any
    key: str | None


def _config_tying(ckpt: Checkpoint) -> _ConfigTying | None:
    if not ckpt.config:
        return None
    architecture = ckpt.architecture
    if architecture is None:
        embed, head = _by_name(ckpt.tensors)
        if embed is None or head is None:
            return None
        return _ConfigTying(embed, head, bool(ckpt.config.get(_FLAG)), _FLAG)
    table, flag = NameTable(architecture.names), as_key(architecture.head.tied)
    names = table.name("embed.weight"), table.name("head.weight")
    if isinstance(flag, Key):
        return _ConfigTying(*names, lookup(flag, ckpt.config), source_of(flag, ckpt.config) or flag.spellings[0])
    return _ConfigTying(*names, flag.bind(ckpt.config) if hasattr(flag, "bind") else flag, None)


def _untied(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The config with a key (a dot goes into a nested object) false, and transformers' own at the top where it is."""
    changed = dict(config)
    first, _, rest = key.partition(".")
    inner = config.get(first)
    changed[first] = _untied(inner if isinstance(inner, Mapping) else {}, rest) if rest else False
    if rest and _FLAG in changed:
        changed[_FLAG] = False
    return changed


def _checked_equal(embed: Lazy, head: Lazy, tying: _ConfigTying, label: str) -> Lazy:
    """The embedding, compared with the head row by row where it is read."""

    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not (x == y).all():
            raise InputError(
                f"{label}: {tying.head} differs in some rows from the embedding {tying.embed}, to which the config "
                "ties it",
                hint=f"set {tying.key or _FLAG} in config.json to false: then the stored head is used",
            )
        return x

    return Apply("tied", [embed, head], embed.spec, fn).output()


def _by_name(tensors: Mapping[str, Lazy]) -> tuple[str | None, str | None]:
    """Embedding and head by the usual names; a head has the embedding's shape."""
    embed = _by_last(tensors, _EMBEDDINGS, None)
    return embed, None if embed is None else _by_last(tensors, _HEADS, tensors[embed].shape)


def _by_last(tensors: Mapping[str, Lazy], words: Iterable[str], shape: tuple[int, ...] | None) -> str | None:
    for word in words:
        for name, lazy in tensors.items():
            fits = len(lazy.shape) == 2 if shape is None else lazy.shape[1:] == shape[1:] and len(lazy.shape) == 2
            if name.split(".")[-2:] == [word, "weight"] and fits:
                return name
    return None
