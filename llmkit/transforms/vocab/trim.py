"""`trim`: a smaller vocabulary that cuts a given text as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import require_model
from llmkit.errors import InputError, RequirementError
from llmkit.formats.text_file import read_text
from llmkit.tokenization.bpe import Priority, apply_bpe, by_rank, by_score
from llmkit.tokenization.bundle import TokenizerFiles, read_tokenizer
from llmkit.tokenization.byte_level import from_bytes
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.sentencepiece_model import SPACE, PieceKind, SentencePieceModel
from llmkit.transforms.vocab.change import Change, resized
from llmkit.transforms.vocab.config_ids import mentioned_ids
from llmkit.transforms.vocab.initial import new_rows

OnProgress = Callable[[int, int], None]

_CHUNK_CHARS = 2**20
_N_CHECKED = 1000
_REPORT_CHARS = 2**16


def trim(
    ckpt: Checkpoint,
    corpus: str | Path,
    *,
    keep_ids: Iterable[int] = (),
    min_count: int = 1,
    pad_to_multiple: int | None = None,
    on_progress: OnProgress | None = None,
) -> Checkpoint:
    """The model with only the tokens that `corpus` needs, and those that nothing can do without.

    Kept besides the tokens of the corpus: every symbol that a merge makes on the way to a kept token; special and
    added tokens; the 256 bytes; ASCII characters; ids that the configs name. With `min_count` 1 the text of the
    corpus is cut into the same tokens as before.

    Args:
        corpus: a text file in UTF-8.
        keep_ids: further ids to keep.
        min_count: tokens that are rarer in the corpus are left out.
        pad_to_multiple: rows are filled up to a multiple of this.
        on_progress: called with the characters of the corpus that are cut, of how many.

    Raises:
        InputError: the corpus cannot be read, or an id is none.
        RequirementError: a kind of tokenizer that cannot be trimmed, or a quantized head.
    """
    require_model(ckpt, "vocab trim")
    tokenizer = TokenizerFiles.of(ckpt)
    if tokenizer.kind not in ("sentencepiece", "unigram", "byte_level"):
        raise RequirementError(
            f"{ckpt.label} has a {tokenizer.kind} tokenizer; BPE and Unigram ones can be trimmed",
            hint=f"llmkit vocab info {ckpt.origin or ckpt.label} shows what it is",
        )
    lines = read_corpus(Path(corpus))
    counts = _counts(tokenizer, lines, on_progress)
    used = {i for i, n in counts.items() if n >= min_count}
    extra = set(keep_ids)
    if strangers := sorted(i for i in extra if not 0 <= i < tokenizer.n_tokens):
        raise InputError(f"id {strangers[0]} is no token: {ckpt.label} has {tokenizer.n_tokens}")
    basic = _indispensable(tokenizer) | {i for i in mentioned_ids(ckpt) if i < tokenizer.n_tokens}
    kept = used | basic | extra
    kept |= (between := _passed_through(tokenizer, kept) - kept)
    old_of = tuple(sorted(kept))
    new_of = {old: new for new, old in enumerate(old_of)}
    sp, fast = _smaller(tokenizer, new_of)
    files = tokenizer.rewritten(new_of, sp=sp, fast=fast)
    figures = {"tokens": len(old_of), "of_corpus": len(used), "of_merges": len(between)}
    notes = [
        f"{len(old_of)} of {tokenizer.n_tokens} tokens are kept: {len(used)} of the corpus"
        + (f" (at least {min_count} times)" if min_count > 1 else "")
        + f", {len(kept - used - between)} more that are special, bytes or ASCII, "
        f"{len(between)} that merges pass through"
    ]
    warnings = []
    n_checked, n_other = _checked(tokenizer, read_tokenizer(ckpt.label, files), new_of, lines)
    notes.append(f"checked on {n_checked} lines of the corpus: {n_checked - n_other} are cut as before")
    if n_other and min_count == 1:
        warnings.append(f"{n_other} of {n_checked} lines of the corpus are cut otherwise than before")
    step = {"transform": "vocab.trim", "model": ckpt.label, "corpus": Path(corpus).name, "min_count": min_count}
    return resized(
        ckpt,
        Change(old_of, (), files, tuple(notes), tuple(warnings), figures),
        partial(new_rows, init="mean", seed=0),
        n_tokens_before=tokenizer.n_tokens,
        pad_to_multiple=pad_to_multiple,
        keep_padding=False,
        step=step,
    )


def read_corpus(path: Path) -> list[str]:
    """The lines of a text file, without their ends.

    Raises:
        InputError: no such file, not UTF-8, or nothing in it.
    """
    text = read_text(path)
    lines = text.split("\n")
    if not text.strip():
        raise InputError(f"{path} has no text in it")
    return lines


class TrackedTexts:
    """Texts that are iterated while their progress is reported, some characters at a time.

    Args:
        total: characters of all texts that will pass, and a line end for each.
        on_progress: called with those that are done, and the total.
    """

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._total, self._on_progress = total, on_progress or (lambda done, total: None)
        self._done = self._reported = 0
        self._on_progress(0, total)

    def over(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts, one after the other."""
        for text in texts:
            yield text
            self._done += len(text) + 1
            if self._done - self._reported >= _REPORT_CHARS or self._done == self._total:
                self._reported = self._done
                self._on_progress(self._done, self._total)


def _encoders(tokenizer: TokenizerFiles) -> list[Callable[[str], list[int]]]:
    """Of both files where there are two: loaders differ in which they take."""
    return [source.encoder() for source in (tokenizer.sp, tokenizer.fast) if source is not None]


def _counts(tokenizer: TokenizerFiles, lines: list[str], on_progress: OnProgress | None) -> Counter[int]:
    """How often each id occurs, the text taken line by line and, for what spans lines, in long chunks."""
    counts: Counter[int] = Counter()
    encoders = _encoders(tokenizer)
    tracked = TrackedTexts(2 * len(encoders) * sum(len(line) + 1 for line in lines), on_progress)
    for encode in encoders:
        by_line: Counter[int] = Counter()
        for line in tracked.over(lines):
            by_line.update(encode(line))
        spanning: Counter[int] = Counter()
        for chunk in tracked.over(_chunks(lines)):
            spanning.update(encode(chunk))
        counts |= by_line | spanning
    return counts


def _chunks(lines: list[str]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line) + 1
        if size >= _CHUNK_CHARS:
            yield "\n".join(held)
            held, size = [], 0
    if held:
        yield "\n".join(held)


def _indispensable(tokenizer: TokenizerFiles) -> set[int]:
    kept = set(tokenizer.added)
    if tokenizer.sp is not None:
        needed = (PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.USER_DEFINED, PieceKind.BYTE)
        kept |= {i for i, p in enumerate(tokenizer.sp.pieces) if p.kind in needed}
    ids = tokenizer.known
    if tokenizer.kind == "byte_level":
        names = [from_bytes(bytes([b])) for b in range(256)]
    else:
        names = [SPACE, *map(chr, range(128)), *(f"<0x{b:02X}>" for b in range(256))]
        unk = tokenizer.fast.data["model"].get("unk_token") if tokenizer.fast is not None else None
        names += [unk] if isinstance(unk, str) else []
    return kept | {ids[name] for name in names if name in ids}


def _passed_through(tokenizer: TokenizerFiles, kept: Collection[int]) -> set[int]:
    """Ids of the symbols that BPE makes on its way to each kept token, in whichever file."""
    passed: set[int] = set()
    for ids, priority in _readings(tokenizer):
        texts = {i: text for text, i in ids.items()}
        for i in kept:
            text = texts.get(i, "")
            if len(text) > 1:
                merged = apply_bpe(text, priority).made
                passed |= {ids[part] for part in (*text, *merged) if part in ids}
    return passed


def _readings(tokenizer: TokenizerFiles) -> Iterator[tuple[dict[str, int], Priority]]:
    if tokenizer.sp is not None and tokenizer.sp.model_type == "bpe":
        yield dict(tokenizer.sp.ids), by_score(tokenizer.sp.scores)
    if tokenizer.fast is not None and tokenizer.fast.kind in ("byte_level", "sentencepiece"):
        ranks = {pair: i for i, pair in enumerate(tokenizer.fast.merges)}
        yield dict(tokenizer.fast.vocab), by_rank(ranks)


def _smaller(
    tokenizer: TokenizerFiles, new_of: dict[int, int]
) -> tuple[SentencePieceModel | None, FastTokenizer | None]:
    sp, fast = tokenizer.sp, tokenizer.fast
    if sp is not None:
        sp = sp.with_pieces([p for i, p in enumerate(sp.pieces) if i in new_of])
    if fast is None:
        return sp, None
    if fast.kind == "unigram":
        rows = [(text, score) for i, (text, score) in enumerate(fast.data["model"]["vocab"]) if i in new_of]
        unk = fast.data["model"].get("unk_id")
        return sp, fast.with_unigrams(rows, None if unk is None else new_of[unk])
    vocab = {text: new_of[i] for text, i in fast.vocab.items() if i in new_of}
    merges = [(a, b) for a, b in fast.merges if a in vocab and b in vocab and a + b in vocab]
    return sp, fast.with_model(vocab, merges)


def _checked(
    before: TokenizerFiles, after: TokenizerFiles, new_of: dict[int, int], lines: list[str]
) -> tuple[int, int]:
    """Of some lines spread over the corpus: how many were compared, and how many are cut otherwise than before."""
    chosen = [line for line in lines if line.strip()]
    chosen = chosen[:: max(1, len(chosen) // _N_CHECKED)][:_N_CHECKED]
    n_other = 0
    pairs = list(zip(_encoders(before), _encoders(after), strict=True))
    for line in chosen:
        n_other += any([new_of.get(i) for i in old(line)] != new(line) for old, new in pairs)
    return len(chosen), n_other
