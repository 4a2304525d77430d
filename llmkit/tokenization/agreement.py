"""Do the tokenizer and the embedding of a checkpoint agree? Inferred from files and headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import LlmkitError, SpecError
from llmkit.tokenization.vocabulary import Vocabulary, read_vocabulary


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the comparison found, in words.

    Attributes:
        note: harmless: the embedding is padded.
        warning: tokens without a row.
    """

    note: str | None = None
    warning: str | None = None


def compare_counts(vocabulary: Vocabulary | None, n_rows: int | None) -> Agreement:
    """Compare the number of tokens with the rows of the embedding, where both are known."""
    if vocabulary is None or n_rows is None or vocabulary.n_tokens == n_rows:
        return Agreement()
    if vocabulary.n_tokens > n_rows:
        return Agreement(
            warning=f"the tokenizer has {vocabulary.n_tokens} tokens, the embedding {n_rows} rows: "
            f"ids from {n_rows} on have none (is this the tokenizer of another model?)"
        )
    n = n_rows - vocabulary.n_tokens
    return Agreement(
        note=f"the embedding has {n_rows} rows for the tokenizer's {vocabulary.n_tokens} tokens: {n} are padding"
    )


def compare_vocabulary(ckpt: Checkpoint) -> Agreement:
    """The same for a checkpoint; a tokenizer that cannot be read is a warning."""
    n_rows = embedding_rows(ckpt)
    if n_rows is None:
        return Agreement()
    try:
        return compare_counts(read_vocabulary(ckpt), n_rows)
    except LlmkitError as error:
        return Agreement(warning=f"the tokenizer cannot be read: {error.message}")


def embedding_rows(ckpt: Checkpoint) -> int | None:
    """Rows of the embedding, where a plugin says which tensor it is."""
    try:
        embedding = ckpt.tensors.get(ckpt.model.name_of("embed.weight")) if ckpt.model is not None else None
    except SpecError:
        return None
    return embedding.spec.n_rows if embedding is not None else None
