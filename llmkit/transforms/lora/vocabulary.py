"""An adapter that brings another vocabulary: rows, config and tokenizer change in one step, or it is refused.

The most common mistake with the Chinese adapters of 2023 is a mix-up of two vocabularies that differ by one token
(49,953 pieces, and the same with a padding token, 49,954): the model loads and speaks nonsense. The counts tell them
apart, so the counts are compared: rows of the adapter's embedding, tokens of the tokenizer beside it, rows and tokens
of the model it is merged into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.templates import with_named_templates
from llmkit.errors import RequirementError
from llmkit.formats.adapter import Adapter
from llmkit.formats.tokenizer_files import TOKENIZER_FILES
from llmkit.tokenization.vocabulary import read_vocabulary

_MULTIPLES = (8, 16, 32, 64, 128, 256, 512)


@dataclass
class VocabularyChange:
    """What happens to the vocabulary.

    Attributes:
        n_rows: rows of embedding and head afterwards; None when they stay.
        files: the files of the checkpoint afterwards.
    """

    n_rows: int | None
    files: Mapping[str, FileContent]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def plan_vocabulary(
    ckpt: Checkpoint, adapter: Adapter, n_rows: int, n_after: int | None, *, force: bool
) -> VocabularyChange:
    """Decide what to do with the vocabulary.

    Args:
        n_rows: rows of the embedding now.
        n_after: rows of the embedding that the adapter brings; None when it brings none.

    Raises:
        RequirementError: the counts show that adapter, tokenizer and model do not belong together.
    """
    tokenizer_files = _tokenizer_files(adapter)
    n_own = _count(adapter.label, tokenizer_files)
    n_base = _count(ckpt.label, ckpt.tokenizer_files)
    change = VocabularyChange(None, ckpt.files)
    problem = None if n_after is None else _problem(ckpt, adapter, n_rows, n_after, n_own, n_base)
    if problem is not None:
        message, hint = problem
        if not force:
            raise RequirementError(message, hint=hint)
        change.warnings.append(f"forced: {message}")
    if n_after is None:
        _without_rows(ckpt, adapter, change, n_rows, n_own, n_base, tokenizer_files)
        return change
    if n_after != n_rows:
        change.n_rows = n_after
        change.notes.append(f"{adapter.label} brings its vocabulary: {n_rows} to {n_after} rows")
        if n_own is not None and n_own < n_after:
            change.notes.append(f"{n_after - n_own} rows are padding: its tokenizer has {n_own} tokens")
        if n_after < n_rows and problem is None:
            change.notes.append(f"the {n_rows - n_after} rows left out were padding: the tokenizer had {n_base} tokens")
    if tokenizer_files and (n_after != n_rows or n_base is None or (n_own or 0) > n_base):
        _adopt(ckpt, adapter, change, tokenizer_files)
    return change


def _problem(
    ckpt: Checkpoint, adapter: Adapter, n_rows: int, n_after: int, n_own: int | None, n_base: int | None
) -> tuple[str, str] | None:
    """Why the counts do not fit, and what to do."""
    if n_own is not None and n_own != n_after and not _is_padded(n_after, n_own, n_rows):
        more = n_after - n_own
        if more > 0:
            return (
                f"{adapter.label}: its embedding has {n_after} rows, the tokenizer beside it {n_own} tokens: the "
                f"{more} more row{'s are' if more > 1 else ' is'} padding to a multiple that is not a usual one "
                f"({_MULTIPLES[0]} to {_MULTIPLES[-1]}), or the two belong to two different releases",
                "put the tokenizer that was published with this adapter beside it; --force takes the rows as padding",
            )
        return (
            f"{adapter.label}: its embedding has {n_after} rows, the tokenizer beside it {n_own} tokens: they belong "
            "to two different releases",
            "put the tokenizer that was published with this adapter beside it",
        )
    if n_after < n_rows and (n_base is None or n_base > n_after):
        has = f"{n_rows} rows" + (f" and a tokenizer of {n_base} tokens" if n_base is not None else "")
        return (
            f"{adapter.label} is for a vocabulary of {n_after} rows; {ckpt.label} has {has} by now: it would lose "
            "tokens",
            "merge adapters in the order of their vocabularies, the smallest first, beginning with the original base",
        )
    if n_after > n_rows and n_own is None:
        return (
            f"{adapter.label} brings {n_after} rows, the model has {n_rows}, and there is no tokenizer beside the "
            "adapter: the result would have tokens that nothing writes",
            "put the tokenizer that was published with this adapter into its folder",
        )
    return None


def _is_padded(rows: int, n_tokens: int, n_before: int) -> bool:
    """Whether `rows` is what rounding the number of tokens up gives, or what the model had before."""
    if n_tokens > rows:
        return False
    return rows == n_before or any(rows == -(-n_tokens // m) * m for m in _MULTIPLES)


def _without_rows(
    ckpt: Checkpoint,
    adapter: Adapter,
    change: VocabularyChange,
    n_rows: int,
    n_own: int | None,
    n_base: int | None,
    tokenizer_files: Mapping[str, FileContent],
) -> None:
    if n_own is None:
        return
    if n_own > n_rows:
        change.warnings.append(
            f"{adapter.label}: the tokenizer beside it has {n_own} tokens, the model {n_rows} rows, and the adapter "
            f"brings no rows: the tokenizer of {ckpt.label} is kept"
        )
    elif n_base is None or n_own > n_base:
        _adopt(ckpt, adapter, change, tokenizer_files)
    elif n_own < n_base:
        change.warnings.append(
            f"{adapter.label}: the tokenizer beside it has {n_own} tokens, that of {ckpt.label} {n_base}; the latter "
            "is kept"
        )


def _adopt(
    ckpt: Checkpoint, adapter: Adapter, change: VocabularyChange, tokenizer_files: Mapping[str, FileContent]
) -> None:
    change.files = {k: v for k, v in ckpt.files.items() if k not in TOKENIZER_FILES} | dict(tokenizer_files)
    change.notes.append(f"tokenizer from {adapter.label}")


def _tokenizer_files(adapter: Adapter) -> dict[str, FileContent]:
    if adapter.folder is None:
        return {}
    files = {n: FileContent(path=adapter.folder / n) for n in TOKENIZER_FILES if (adapter.folder / n).is_file()}
    return with_named_templates(files, adapter.folder)


def _count(label: str, files: Mapping[str, FileContent]) -> int | None:
    if not files:
        return None
    vocabulary = read_vocabulary(Checkpoint(label, {}, {}, files))
    return None if vocabulary is None else vocabulary.n_tokens
