"""A change of vocabulary in the tokenizer files, and the same change of tensors and config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import InputError, RequirementError
from llmkit.tensors.lazy import Lazy
from llmkit.transforms.vocab.config_ids import renumbered_generation, resized_config
from llmkit.transforms.vocab.rows import arranged
from llmkit.transforms.vocab.tensors import VocabularyTensors, vocabulary_tensors

# (old matrix, for each new row the old ids of its pieces) -> the new rows
RowMaker = Callable[[Lazy, Sequence[tuple[int, ...]]], Lazy]


@dataclass(frozen=True)
class Change:
    """What became of each id.

    Attributes:
        old_of: for each new id the old one, None for a new token.
        parts: for each new token, in order, the old ids of its old tokenization.
        files: every file of the checkpoint, the tokenizer's rewritten.
        figures: counts for the recipe.
    """

    old_of: tuple[int | None, ...]
    parts: tuple[tuple[int, ...], ...]
    files: Mapping[str, FileContent]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    figures: Mapping[str, int] = field(default_factory=dict)

    @property
    def new_of(self) -> dict[int, int]:
        """Old id -> new id, of the tokens that stay."""
        return {old: new for new, old in enumerate(self.old_of) if old is not None}


def resized(
    ckpt: Checkpoint,
    change: Change,
    make_rows: RowMaker,
    *,
    n_tokens_before: int,
    pad_to_multiple: int | None,
    keep_padding: bool,
    step: Mapping[str, Any],
) -> Checkpoint:
    """The checkpoint with embedding, head, config and files changed together.

    Args:
        make_rows: makes the rows of new tokens and of new padding.
        keep_padding: rows beyond the last token that the old matrix had stay where they are.
        step: the entry of the history.
    """
    vocabulary = vocabulary_tensors(ckpt)
    if n_tokens_before > vocabulary.n_rows:
        raise RequirementError(
            f"{ckpt.label}: the tokenizer has {n_tokens_before} tokens, the embedding {vocabulary.n_rows} rows; "
            "which rows belong to which tokens cannot be told",
            hint="put the tokenizer that these weights were trained with into the folder",
        )
    old_of = list(change.old_of)
    n_rows = max(len(old_of), vocabulary.n_rows) if keep_padding else len(old_of)
    n_rows = _padded(n_rows, pad_to_multiple)
    old_of += [i if keep_padding and i < vocabulary.n_rows else None for i in range(len(old_of), n_rows)]
    n_made = sum(old is None for old in old_of)
    parts = [*change.parts, *[()] * (n_made - len(change.parts))]
    tensors = dict(ckpt.tensors)
    if n_made or old_of != list(range(vocabulary.n_rows)):
        for name in vocabulary.tables:
            held = tensors[name].spec.n_rows
            as_long = [i if i < held else 0 for i in range(vocabulary.n_rows)]
            tensors[name] = arranged(tensors[name], as_long, None) if held != vocabulary.n_rows else tensors[name]
        for name in (*vocabulary.names, *vocabulary.tables):
            new_rows = make_rows(tensors[name], parts) if n_made else None
            tensors[name] = arranged(tensors[name], old_of, new_rows)
    new_of = change.new_of
    return ckpt.derive(
        tensors=tensors,
        config=resized_config(ckpt.config, vocabulary.n_rows, n_rows, new_of, ckpt.label),
        files=renumbered_generation(change.files, new_of),
        step={**step, **change.figures, "rows": n_rows},
        notes=[*change.notes, *_row_notes(vocabulary, n_rows, len(change.old_of))],
        warnings=change.warnings,
    )


_MOST_ROWS = 2**22  # some times the largest vocabularies


def _padded(n_rows: int, multiple: int | None) -> int:
    if multiple is None:
        return n_rows
    if not 0 < multiple <= _MOST_ROWS:
        raise InputError(f"pad_to_multiple {multiple}: expected 1 to {_MOST_ROWS}", hint="64 suits GPUs")
    return -(-n_rows // multiple) * multiple


def _row_notes(vocabulary: VocabularyTensors, n_rows: int, n_tokens: int) -> list[str]:
    what = "the embedding, which is the head too," if vocabulary.is_tied else " and ".join(vocabulary.names)
    padding = f", of which {n_rows - n_tokens} are padding beyond the last token" if n_rows > n_tokens else ""
    notes = [f"{what} from {vocabulary.n_rows} to {n_rows} rows{padding}"]
    return [vocabulary.note, *notes] if vocabulary.note else notes
