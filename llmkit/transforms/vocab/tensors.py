"""Which tensors of a checkpoint have one row for each token."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.architecture.registry import DRAFT
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import RequirementError, SpecError, listing
from llmkit.transforms.vocab.config_ids import SIZE_KEYS

_TABLE = "beside.table.weight"


_NO_ROWS = "rows cannot be added to it"
_FIRST = "change the vocabulary of the float model first, then `llmkit quantize` it"


@dataclass(frozen=True)
class VocabularyTensors:
    """The tensors whose rows are tokens.

    Attributes:
        names: embedding, head and head bias, as far as they are stored.
        n_rows: their rows.
        is_tied: the head is the embedding, and no second matrix is stored.
        tables: further embeddings of tokens, which may have more or fewer rows: an id without one has the first.
        note: how they were found, where no plugin says it.
    """

    names: tuple[str, ...]
    n_rows: int
    is_tied: bool
    note: str | None = None
    tables: tuple[str, ...] = ()


def vocabulary_tensors(ckpt: Checkpoint) -> VocabularyTensors:
    """Find them by the architecture, or by their number of rows where no plugin describes it.

    Raises:
        RequirementError: they are quantized, or cannot be told.
        SpecError: they have different numbers of rows.
    """
    note, tables = None, tuple[str, ...]()
    if ckpt.model is not None:
        slots = ckpt.model.slots
        wanted = [s.name for i, s in slots.items() if i == "embed.weight" or i.startswith("head.")]
        names = tuple(n for n in wanted if n in ckpt.tensors)
        tables = tuple(s.name for i, s in slots.items() if i == _TABLE and s.name in ckpt.tensors)
        for name in (*wanted, *(s.name for i, s in slots.items() if i == _TABLE)):
            stem = name.removesuffix(".weight")
            packed = [n for n in ckpt.tensors if n.startswith(stem + ".") and n not in wanted]
            if name not in ckpt.tensors and packed:
                raise RequirementError(f"{name} is quantized ({listing(packed, 2)}): {_NO_ROWS}", hint=_FIRST)
    else:
        names = _by_size(ckpt)
        note = f"no plugin describes this model; tensors with one row a token were found by size: {listing(names)}"
    if not names:
        raise RequirementError(
            f"{ckpt.label}: no embedding found, so its vocabulary cannot be changed: config.json has none of "
            f"{', '.join(SIZE_KEYS)} beside the sizes of the layers",
            hint="of a model with images or sounds take the language model alone, as it was published",
        )
    rows = {ckpt.tensors[n].spec.n_rows for n in names}
    if len(rows) > 1:
        specs = ", ".join(f"{n} {ckpt.tensors[n].spec}" for n in names)
        raise SpecError(f"{ckpt.label}: embedding and head have different numbers of rows: {specs}")
    bad = [n for n in (*names, *tables) if not ckpt.tensors[n].dtype.is_float]
    if bad:
        kinds = listing(list(dict.fromkeys(ckpt.tensors[n].dtype.name for n in bad)))
        raise RequirementError(f"{listing(bad)} {'is' if len(bad) == 1 else 'are'} {kinds}: {_NO_ROWS}", hint=_FIRST)
    is_tied = sum(len(ckpt.tensors[n].shape) == 2 for n in names) == 1
    return VocabularyTensors(names, rows.pop(), is_tied, note, tables)


def _by_size(ckpt: Checkpoint) -> tuple[str, ...]:
    size = next((ckpt.config[k] for k in SIZE_KEYS if isinstance(ckpt.config.get(k), int)), None)
    if size is None:
        return ()
    names = tuple(n for n, t in ckpt.tensors.items() if t.shape and t.shape[0] == size)
    matrices = [n for n in names if len(ckpt.tensors[n].shape) == 2]
    if not 1 <= len(matrices) <= 2:
        raise RequirementError(
            f"{ckpt.label}: no plugin describes it, and {len(matrices)} matrices have {size} rows "
            f"({listing(matrices, 3)}): which are embedding and head cannot be told",
            hint=DRAFT,
        )
    return names
