"""A model's next-token distributions over a text, in a file with which other models are compared.

A safetensors file: for each scored token all log-probabilities as 16-bit steps below the highest one (`codes` [tokens,
vocab], `high` and `step` [tokens]), the likeliest id (`top`) and the negative log-likelihood of the token that came
(`nll`). Two bytes for each entry of the vocabulary, as llama.cpp's --kl-divergence-base takes. Storing the likeliest
few and the probability of the rest is smaller and wrong: with SmolLM2 on WikiText the 1,024 likeliest of 49,152 miss 2
to 3 % of a mean divergence, the 256 likeliest 5 to 8 %; the steps miss 5e-5 of it where it is 0.001 nats, 1e-6 where
it is 0.3.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import TracebackType

from llmkit.errors import InputError, OutputError
from llmkit.evaluation.divergence import Piece, Spans
from llmkit.evaluation.perplexity import checked_windows, negative_log_likelihood, scored_ranges
from llmkit.formats import safetensors
from llmkit.lazy_imports import torch
from llmkit.pipeline.commit import sync_folder
from llmkit.pipeline.files import check_file
from llmkit.pipeline.journal import HeldElsewhere, take_lock
from llmkit.pipeline.rename import rename_new
from llmkit.pipeline.target import disk_errors, partial_path
from llmkit.tensors.lazy import Context, Lazy
from llmkit.tensors.source import bytes_of
from llmkit.tensors.spec import DType, TensorSpec, format_bytes

FORMAT = "llmkit.reference/1"
_RANGE = 64.0  # nats below the likeliest token; what is less likely counts for nothing
_STEPS = 65535
_HALF = 32768  # codes are stored as signed numbers
_SMALL = {"high": DType.F32, "step": DType.F32, "top": DType.I32, "nll": DType.F64}
_HINT = "name another file for --reference: where none is, this model's distributions are stored"


@dataclass(frozen=True, slots=True)
class WindowedText:
    """What distributions are over.

    Attributes:
        text: digest of the text.
        ids: digest of its token ids.
        n_tokens: how many they are.
    """

    text: str
    ids: str
    n_tokens: int
    context: int
    stride: int

    def windows(self) -> list[tuple[int, int, int]]:
        """See `perplexity.windows`.

        Raises:
            InputError: there are none.
        """
        return checked_windows(self.n_tokens, self.context, self.stride)

    @property
    def n_scored(self) -> int:
        """The tokens that are scored."""
        return sum(end - first for _, end, first in self.windows())


def subject_of(text: str, ids: Sequence[int], context: int, stride: int) -> WindowedText:
    """Of a text, its tokens and the windows over them."""
    digest = hashlib.sha256(array("q", ids).tobytes()).hexdigest()
    return WindowedText(hashlib.sha256(text.encode()).hexdigest(), digest, len(ids), context, stride)


class ReferenceWriter:
    """Writes a reference while a perplexity is measured; the file appears when it is whole.

    Args:
        path: where nothing is yet.
        model: what it is called later.
    """

    def __init__(self, path: Path, model: str, subject: WindowedText) -> None:
        self._path, self._partial = path, partial_path(path)
        self._metadata = {"format": FORMAT, "model": model} | {
            name: str(getattr(subject, name)) for name in WindowedText.__slots__
        }
        self._n = subject.n_scored
        self._done = 0
        self._fd: int | None = None
        self._small: dict[str, list[torch.Tensor]] = {name: [] for name in _SMALL}
        self._starts: dict[str, int] = {}

    def __enter__(self) -> ReferenceWriter:
        return self

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Append the distributions of some tokens: float32 logits [tokens, vocab], ids [tokens].

        Raises:
            OutputError: the disk has too little room, or the file cannot be written.
        """
        log_p = logits.log_softmax(-1).cpu()
        high, top = log_p.max(-1)
        step = (high - log_p.amin(-1)).clamp(1e-6, _RANGE) / _STEPS
        codes = ((high[:, None] - log_p) / step[:, None]).round_().clamp_(0, _STEPS)
        nll = negative_log_likelihood(logits, targets).cpu()
        for name, values in zip(_SMALL, (high, step, top.int(), nll), strict=True):
            self._small[name].append(values)
        with _disk_errors(self._path):
            fd = self._open(log_p.shape[1])
            data = bytes_of((codes.int() - _HALF).short())
            _write_at(fd, data, self._starts["codes"] + self._done * log_p.shape[1] * 2)
        self._done += len(log_p)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._fd is None:
            return
        try:
            if kind is None:
                with _disk_errors(self._path):
                    for name, pieces in self._small.items():
                        _write_at(self._fd, bytes_of(torch.cat(pieces)), self._starts[name])
                    os.fsync(self._fd)
                    rename_new(self._partial, self._path)
                    sync_folder(self._path.absolute().parent)
        finally:
            os.close(self._fd)
            self._partial.unlink(missing_ok=True)

    def _open(self, n_vocab: int) -> int:
        """The file, with its header, at the first distributions: they tell the vocabulary."""
        if self._fd is None:
            specs = {"codes": TensorSpec(DType.I16, (self._n, n_vocab))}
            specs |= {name: TensorSpec(dtype, (self._n,)) for name, dtype in _SMALL.items()}
            header, self._starts, nbytes = safetensors.layout(specs, self._metadata)
            free = shutil.disk_usage(self._path.absolute().parent).free
            if nbytes > free:
                raise OutputError(
                    f"{self._path} needs {format_bytes(nbytes)} ({self._n} tokens of a vocabulary of {n_vocab}), the "
                    f"disk has {format_bytes(free)} free"
                )
            fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                take_lock(fd, self._partial, str(self._path))
                os.ftruncate(fd, 0)  # what a killed run left
            except BaseException:
                os.close(fd)
                raise
            self._fd = fd
            _write_at(self._fd, header, 0)
        return self._fd


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        with disk_errors(path):
            yield
    except HeldElsewhere:
        raise
    except OutputError as error:  # nothing is resumed here
        raise OutputError(error.message, hint="free some space, give a shorter text, or another place") from error


def check_reference_path(path: Path) -> None:
    """Refuse, before anything is computed, a path where no reference can be written.

    Raises:
        OutputError: its folder is missing or cannot be written, or another file lies in the way.
    """
    check_file(path, "a reference", lambda head: safetensors.looks_like(head) and FORMAT.encode() in head)


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


@dataclass(frozen=True)
class Reference:
    """The distributions in a file, as `divergence.Distributions`.

    Attributes:
        path: of the file.
        model: what the model was called.
        subject: the text, tokens and windows.
    """

    path: Path
    model: str
    subject: WindowedText
    tensors: Mapping[str, Lazy]

    def check(self, subject: WindowedText) -> None:
        """Refuse another text, tokenizer, context or stride.

        Raises:
            InputError: saying what is other.
        """
        mine = self.subject
        if mine.text != subject.text:
            raise InputError(f"{self.path} is about another text", hint=_HINT)
        if mine.ids != subject.ids:
            raise InputError(
                f"{self.path} is of {mine.n_tokens} other tokens of this text, which has {subject.n_tokens} here: "
                f"{self.model} has another tokenizer",
                hint="distributions over other vocabularies do not compare; compare bits per byte",
            )
        if (mine.context, mine.stride) != (subject.context, subject.stride):
            raise InputError(
                f"{self.path} is of windows of {mine.context} tokens every {mine.stride}, not of {subject.context} "
                f"every {subject.stride}",
                hint=f"--context {mine.context} --stride {mine.stride}",
            )

    def pieces(self, ids: Sequence[int], batch: Spans) -> Iterator[Piece]:
        """See `divergence.Distributions`."""
        row = self._rows[batch[0][0]]
        for _, low, high in scored_ranges(batch):
            rows = (row, row + high - low)
            row = rows[1]
            context = Context()
            codes, top, step, best, nll = (
                context.rows(self.tensors[name], rows) for name in ("codes", "top", "step", "high", "nll")
            )
            log_p = best[:, None] - (codes.float() + _HALF) * step[:, None]
            if not bool(log_p.isfinite().all() & nll.isfinite().all()):
                raise InputError(f"{self.path}: rows {rows[0]} to {rows[1]} are no probabilities", hint=_HINT)
            yield Piece(log_p.log_softmax(-1), nll, top.long())

    @cached_property
    def _rows(self) -> dict[int, int]:
        """The beginning of each window -> the first of its rows."""
        spans = self.subject.windows()
        return dict(zip((s for s, _, _ in spans), accumulate((e - f for _, e, f in spans), initial=0), strict=False))


def read_reference(path: Path) -> Reference:
    """A file that `perplexity --reference` wrote.

    Raises:
        InputError: it is none, is truncated, or says of itself what cannot be.
    """
    try:
        return _read(path)
    except InputError as error:
        raise InputError(error.message, hint=_HINT) from error


def _read(path: Path) -> Reference:
    tensors, metadata = safetensors.read(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is no reference of llmkit perplexity, expected the format {FORMAT}")
    try:
        numbers = [int(metadata[name]) for name in ("n_tokens", "context", "stride")]
        subject = WindowedText(metadata["text"], metadata["ids"], *numbers)
        specs = {name: tensors[name].spec for name in ("codes", *_SMALL)}
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: {error} is missing or no number") from error
    n, n_vocab = specs["codes"].shape if len(specs["codes"].shape) == 2 else (0, 0)
    if subject.n_tokens > 2 * n + 1 or subject.n_scored != n:  # two tokens score one, at least
        raise InputError(f"{path}: {n} distributions are not those of {subject.n_tokens} tokens")
    expected = {name: TensorSpec(dtype, (n,)) for name, dtype in _SMALL.items()}
    expected["codes"] = TensorSpec(DType.I16, (n, n_vocab))
    wrong = [name for name, spec in expected.items() if specs[name] != spec]
    if wrong:
        raise InputError(f"{path}: {wrong[0]} is {specs[wrong[0]]}, expected {expected[wrong[0]]}")
    return Reference(path, metadata.get("model", ""), subject, tensors)
