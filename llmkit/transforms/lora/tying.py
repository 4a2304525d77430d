"""How an adapter changes embedding and head: whether they stay one matrix, from what its file holds.

Where base and head are one matrix, PEFT loads into that matrix what is frozen in training (weights under an update),
whether the file has it for the embedding or the head, and the rows of trained tokens; an update or a whole module that
it saved belongs to the one of the two that it names. Both changed alike, as PEFT leaves them where it ties the changes
too, stay one. What a config says of it (`ensure_weight_tying`) decides nothing: PEFT itself may not have been able to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmkit.architecture.registry import DRAFT
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.embeddings import Embeddings
from llmkit.errors import RequirementError, SpecError, listing
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_config import saved_modules
from llmkit.tensors.equality import are_equal
from llmkit.tensors.lazy import Lazy
from llmkit.transforms.lora.arithmetic import transposed
from llmkit.transforms.lora.names import Paths
from llmkit.transforms.lora.vocabulary import VocabularyChange, plan_vocabulary


@dataclass(kw_only=True)
class EmbeddingPlan(VocabularyChange):
    """What becomes of the vocabulary, of embedding and head.

    Attributes:
        adapter: what is left to do: what repeats the other one's change is taken out, shared rows are put in.
        tensors: of the base before anything of that is done: without a copy of a tied head, or with the head that is
            a matrix of its own from now on.
        unties: the head is no longer the embedding.
    """

    adapter: Adapter
    tensors: dict[str, Lazy]
    unties: bool = False


def plan_embeddings(
    ckpt: Checkpoint, adapter: Adapter, embeddings: Embeddings, paths: Paths, *, force: bool
) -> EmbeddingPlan:
    """Decide about embedding and head, and about the vocabulary that the adapter brings.

    Raises:
        RequirementError: counts of tokens that do not belong together, or a head that cannot be told apart.
        SpecError: the base has no embedding.
    """
    if embeddings.embed is None:
        return EmbeddingPlan(None, ckpt.files, adapter=adapter, tensors=dict(ckpt.tensors))
    embed = ckpt.tensors.get(embeddings.embed)
    if embed is None:
        raise SpecError(f"{ckpt.label}: its embedding {embeddings.embed} is missing")
    at_embed, at_head = _path_to(embeddings.embed, adapter, paths), _path_to(embeddings.head, adapter, paths)
    n_after = _rows_brought(adapter, at_embed, at_head, embed.shape[0])
    vocabulary = plan_vocabulary(ckpt, adapter, embed.shape[0], n_after, force=force)
    plan = EmbeddingPlan(**vars(vocabulary), adapter=adapter, tensors=dict(ckpt.tensors))
    if embeddings.is_tied and (at_embed is not None or at_head is not None):
        _plan_tied(plan, ckpt, embeddings, at_embed or _module(embeddings.embed), at_head)
    return plan


def _plan_tied(
    plan: EmbeddingPlan, ckpt: Checkpoint, embeddings: Embeddings, at_embed: str, at_head: str | None
) -> None:
    """Plan for tied matrices: a frozen base weight replaces the shared matrix; the other changes are compared."""
    head = embeddings.head
    adapter = plan.adapter
    embed = str(embeddings.embed)
    at_other = at_head or (_module(head) if head is not None else "")
    replacements = dict(adapter.replacements)
    frozen = [replacements.pop(f"{m}.weight") for m in (at_other, at_embed) if _is_frozen(adapter, m)]
    is_only_embedding = at_head is None and plan.n_rows is not None and f"{at_embed}.weight" in replacements
    if is_only_embedding and not _is_saved(adapter, at_embed):
        frozen.append(replacements.pop(f"{at_embed}.weight"))
        plan.warnings.append(
            f"{adapter.label} resizes the embedding of a model whose head is tied to it, and holds no head: it stays "
            "tied, which is right only if it was in training"
        )
    if frozen:
        plan.tensors[embed] = frozen[-1].cast(plan.tensors[embed].dtype)
    tokens = dict(adapter.tokens)
    if at_embed in tokens and at_other:
        tokens.setdefault(at_other, tokens[at_embed])
    adapter = replace(adapter, replacements=replacements, tokens=tokens)
    if _changes_both_equally(adapter, at_embed, at_other):
        if head is not None:
            plan.tensors.pop(head, None)  # a stored copy would no longer agree
        plan.notes.append("the head stays tied to the embedding: the adapter changes both alike, or only rows of both")
        plan.adapter = _without(adapter, at_other)
        return
    if head is None:
        raise RequirementError(
            f"{plan.adapter.label} changes the embedding of {ckpt.label} on its own; its head is tied to that, and "
            "under which name it would be stored is not known",
            hint=DRAFT,
        )
    others = [n for n, source in embeddings.shares.items() if source == embed and n != head]
    if others:
        raise RequirementError(
            f"{plan.adapter.label} changes embedding or head of {ckpt.label} on its own; tied to it are {head} and "
            f"{listing(others)}, and its class computes otherwise when they are not",
            hint="merge it with peft",
        )
    for name, source in embeddings.shares.items():
        plan.tensors.setdefault(name, plan.tensors[source])
    plan.tensors[head] = plan.tensors[embed]
    plan.adapter, plan.unties = adapter, True
    plan.notes.append(
        f"the head is untied from the embedding: the adapter changes {'both' if at_head else 'one'} of them on its "
        "own, as the live model does; tie_word_embeddings becomes false"
    )


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _path_to(name: str | None, adapter: Adapter, paths: Paths) -> str | None:
    """The adapter's path of what it does to the tensor `name`."""
    if name is None:
        return None
    replaced = [n.removesuffix(".weight") for n in adapter.replacements if n.endswith(".weight")]
    module = _module(name)
    return next((p for p in (*adapter.modules, *adapter.tokens, *replaced) if paths.module(p) == module), None)


def _rows_brought(adapter: Adapter, at_embed: str | None, at_head: str | None, n_rows: int) -> int | None:
    """Rows of the vocabulary that the adapter was trained with, where it holds all that the base lacks."""
    for path in (at_embed, at_head):
        if path is not None and f"{path}.weight" in adapter.replacements:
            return adapter.replacements[f"{path}.weight"].shape[0]
    ids = frozenset(adapter.tokens[at_embed][0] if at_embed is not None and at_embed in adapter.tokens else ())
    last = max(ids, default=-1) + 1
    return last if last > n_rows and ids.issuperset(range(n_rows, last)) else None


def _is_frozen(adapter: Adapter, path: str) -> bool:
    """Whether the whole weight at a path is what lay under an update in training."""
    return f"{path}.weight" in adapter.base_copies


def _is_saved(adapter: Adapter, path: str) -> bool:
    """Whether a module was trained whole. PEFT saves both, too, when the vocabulary was resized."""
    return any(path == m or path.endswith(f".{m}") for m in saved_modules(adapter.config))


def _changes_both_equally(adapter: Adapter, at_embed: str, at_head: str) -> bool:
    """Whether an adapter makes the same change to embedding and head."""
    mine, other = (adapter.replacements.get(f"{m}.weight") for m in (at_embed, at_head))
    if (mine is None) != (other is None) or (mine is not None and other is not None and not are_equal(mine, other)):
        return False
    rows, others = adapter.tokens.get(at_embed), adapter.tokens.get(at_head)
    if (rows is None) != (others is None):
        return False
    if rows is not None and others is not None and not (rows[0] == others[0] and are_equal(rows[1], others[1])):
        return False
    parts, pair = adapter.modules.get(at_embed), adapter.modules.get(at_head)
    if parts is None and pair is None:
        return True
    left, right = _low_rank(parts or {}), _low_rank(pair or {})
    if left is None or right is None or adapter.scaling.get(at_embed) != adapter.scaling.get(at_head):
        return False
    return all(are_equal(a, b) for a, b in zip(left, right, strict=True))


def _low_rank(parts: Mapping[str, Lazy]) -> tuple[Lazy, Lazy] | None:
    """The factors [vocab, r] and [r, hidden] of an update of one of the two; None for any other change."""
    if set(parts) == {"lora_embedding_A", "lora_embedding_B"}:
        return transposed(parts["lora_embedding_A"]), transposed(parts["lora_embedding_B"])
    return (parts["lora_B"], parts["lora_A"]) if set(parts) == {"lora_A", "lora_B"} else None


def _without(adapter: Adapter, path: str) -> Adapter:
    return replace(
        adapter,
        modules={m: p for m, p in adapter.modules.items() if m != path},
        tokens={m: t for m, t in adapter.tokens.items() if m != path},
        replacements={n: t for n, t in adapter.replacements.items() if n != f"{path}.weight"},
    )
