"""`extend`: a larger vocabulary."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import require_model
from llmkit.errors import InputError, RequirementError, listing, require_choice
from llmkit.tokenization.bundle import TokenizerFiles
from llmkit.transforms.vocab.change import Change, RowMaker, resized
from llmkit.transforms.vocab.extend_byte_level import extend_added, extend_bytes
from llmkit.transforms.vocab.extend_sentencepiece import extend_pieces
from llmkit.transforms.vocab.initial import INITS, check_init, new_rows
from llmkit.transforms.vocab.sources import Source, read_source


def extend(
    ckpt: Checkpoint,
    source: str | Path,
    *,
    init: str = "mean",
    as_: str | None = None,
    scores: str | None = None,
    pad_to_multiple: int | None = None,
    corpus: str | Path | None = None,
    seed: int = 0,
) -> Checkpoint:
    """The model with the tokens of `source` that it lacks: tokenizer files, embedding, head and configs.

    Args:
        source: a SentencePiece model, tokenizer.json, a tiktoken file, a folder with one, or a text file with one
            token a line.
        init: how new rows begin: mean, pieces, zero, normal or focus.
        as_: `pieces` enters them into the vocabulary, with merges; `added` as added tokens. None is `added` for a
            text file, `pieces` for a tokenizer.
        scores: for SentencePiece: zero, own or after (see `llmkit.transforms.vocab.extend_sentencepiece.SCORES`).
        pad_to_multiple: rows are filled up to a multiple of this.
        corpus: text for `focus`.
        seed: of `normal` and `focus`.

    Raises:
        InputError: the source or an option cannot be read.
        RequirementError: the model's tokenizer is of a kind that cannot be extended, or its head is quantized.
    """
    check_init(init)
    require_model(ckpt, "vocab extend")
    tokenizer = TokenizerFiles.of(ckpt)
    tokens = read_source(Path(source))
    change = _change(tokenizer, tokens, as_, scores)
    if not change.parts:
        raise InputError(
            f"{tokens.label} brings no token that {ckpt.label} lacks ({len(tokens.entries)} looked at)",
            hint="nothing is to be done; tokens that it lacks come from another file: --with FILE",
        )
    step = {
        "transform": "vocab.extend", "model": ckpt.label, "with": tokens.label, "init": init,
        **({"seed": seed} if init in ("normal", "focus") else {}), **({"scores": scores} if scores else {}),
    }  # fmt: skip
    extended = resized(
        ckpt,
        change,
        _row_maker(ckpt, change, init, seed, corpus),
        n_tokens_before=tokenizer.n_tokens,
        pad_to_multiple=pad_to_multiple,
        keep_padding=True,
        step=step,
    )
    return extended.derive(notes=[f"new rows: {INITS[init]}"])


def _change(tokenizer: TokenizerFiles, source: Source, as_: str | None, scores: str | None) -> Change:
    require_choice("--as", as_ or "pieces", ("pieces", "added"))
    if scores is not None and tokenizer.kind not in ("sentencepiece", "unigram"):
        raise InputError(f"--scores is for SentencePiece; {tokenizer.label} has a {tokenizer.kind} tokenizer")
    whole = [token for token in source.added if not token.get("special")]
    if (as_ or ("added" if source.kind == "words" else "pieces")) == "added":
        entries, n_lost = source.spelled_for("words")[0], 0
        change = extend_added(tokenizer, [*({"content": e.token} for e in entries), *whole])
    elif tokenizer.kind == "byte_level":
        entries, n_lost = source.spelled_for(tokenizer.kind)
        change = extend_bytes(tokenizer, entries, whole)
    elif tokenizer.kind in ("sentencepiece", "unigram"):
        entries, n_lost = source.spelled_for(tokenizer.kind)
        change = extend_pieces(tokenizer, entries, scores, build=source.kind != "sentencepiece", added=whole)
    else:
        raise RequirementError(
            f"{tokenizer.label} has a {tokenizer.kind} tokenizer; merges are added to BPE ones",
            hint="give the words as a text file with --as added",
        )
    notes = []
    if n_lost:
        notes.append(f"{n_lost} tokens of {source.label} are parts of characters or unspellable here, and are left out")
    special = [t["content"] for t in source.added if t.get("special") and t["content"] not in tokenizer.known]
    if special:
        notes.append(
            f"special tokens of {source.label} are left out: only its own model knows what they stand for "
            f"({listing(special)})"
        )
    return replace(change, notes=(*change.notes, *notes))


def _row_maker(ckpt: Checkpoint, change: Change, init: str, seed: int, corpus: str | Path | None) -> RowMaker:
    if init == "focus":
        from llmkit.transforms.vocab.focus import focus_rows

        return focus_rows(ckpt, change, corpus, seed=seed)
    return partial(new_rows, init=init, seed=seed)
