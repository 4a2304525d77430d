"""FOCUS: a new row as a sparse combination of old rows, by how alike the tokens are used in a text.

After Dobler & de Melo (2023), "FOCUS: Effective Embedding Initialization for Monolingual Specialization of
Multilingual Models": tokens that both vocabularies have keep their rows; every other token is a sparsemax-weighted
(Martins & Astudillo, 2016) combination of those, by cosine similarity in an auxiliary space learnt from a text in the
target language. Their space is fastText's; ours is the factorization of the positive pointwise mutual information of
the same text (Levy, Goldberg & Dagan, 2015: smoothed contexts, square root of the singular values), which needs no
further library and is the same on every run. A token that the text does not hold is the mean of its old pieces.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import RequirementError
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Lazy
from llmkit.tokenization.bundle import read_tokenizer
from llmkit.transforms.vocab.change import Change, RowMaker
from llmkit.transforms.vocab.initial import Mixture, combined_rows, mean_of
from llmkit.transforms.vocab.trim import read_corpus

_WINDOW = 5
_RANK = 128
_ITERATIONS = 4
# Sparsemax keeps a prefix of the sorted similarities; longer prefixes are cut, and the weights still sum to one.
_LONGEST = 128
_BLOCK = 512
Pairs = Counter[tuple[int, int]]


def focus_rows(ckpt: Checkpoint, change: Change, corpus: str | Path | None, *, seed: int) -> RowMaker:
    """A maker of rows that learns the similarities once, while the first rows are computed.

    Raises:
        RequirementError: no corpus is given.
        InputError: it cannot be read.
    """
    if corpus is None:
        raise RequirementError(
            "init focus learns from a text in the new language which tokens are alike, and none is given",
            hint="add --corpus FILE (some megabytes of text), or use --init pieces",
        )
    lines = read_corpus(Path(corpus))
    encode = read_tokenizer(ckpt.label, change.files).encoder()
    mixtures = _Once(lambda: _mixtures(change, [encode(line) for line in lines if line.strip()], seed))
    attrs = {
        "corpus": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16], "seed": seed, "rank": _RANK,
        "window": _WINDOW,
    }  # fmt: skip

    def make(matrix: Lazy, parts: Sequence[tuple[int, ...]]) -> Lazy:
        padding = [mean_of(())] * (len(parts) - len(change.parts))
        return combined_rows(matrix, len(parts), lambda: [*mixtures.get(), *padding], "focus_rows", attrs, _LONGEST)

    return make


class _Once:
    """A value computed when it is first wanted, by one thread."""

    def __init__(self, compute: Callable[[], list[Mixture]]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._value: list[Mixture] | None = None

    def get(self) -> list[Mixture]:
        with self._lock:
            if self._value is None:
                self._value = self._compute()
            return self._value


def _mixtures(change: Change, sentences: Sequence[Sequence[int]], seed: int) -> list[Mixture]:
    """For each new token, in order, the old ids that it is made of and their weights."""
    fallback = [mean_of(p) for p in change.parts]
    pairs = _cooccurrences(sentences)
    seen = sorted({i for i, _ in pairs})
    if not seen:
        return fallback
    vectors = _vectors(pairs, seen, seed)
    new_ids = [i for i, old in enumerate(change.old_of) if old is None]
    position = {token: row for row, token in enumerate(seen)}
    anchors = [(row, old) for row, token in enumerate(seen) if (old := change.old_of[token]) is not None]
    if not anchors:
        return fallback
    anchor_vectors = vectors[[row for row, _ in anchors]]
    wanted = [(n, position[token]) for n, token in enumerate(new_ids) if token in position]
    mixtures = list(fallback)
    for start in range(0, len(wanted), _BLOCK):
        block = wanted[start : start + _BLOCK]
        similar = vectors[[row for _, row in block]] @ anchor_vectors.T
        top, places = torch.topk(similar, min(_LONGEST, len(anchors)), dim=1)
        weights = sparsemax(top)
        for (n, _), row_weights, row_places in zip(block, weights.tolist(), places.tolist(), strict=True):
            kept = [(anchors[p][1], w) for w, p in zip(row_weights, row_places, strict=True) if w > 0]
            mixtures[n] = (tuple(i for i, _ in kept), tuple(w for _, w in kept))
    return mixtures


def _cooccurrences(sentences: Sequence[Sequence[int]]) -> Pairs:
    """Ordered pairs of tokens within the window of a line, both directions."""
    pairs: Pairs = Counter()
    for ids in sentences:
        for distance in range(1, _WINDOW + 1):
            for left, right in zip(ids, ids[distance:], strict=False):
                pairs[left, right] += 1
                pairs[right, left] += 1
    return pairs


def _vectors(pairs: Pairs, seen: Sequence[int], seed: int) -> torch.Tensor:
    """Unit vectors of the tokens seen, [n, rank]: U sqrt(S) of the positive PMI by randomized subspace iteration."""
    n = len(seen)
    position = {token: row for row, token in enumerate(seen)}
    index = torch.tensor([[position[a], position[b]] for a, b in pairs]).T
    count = torch.tensor(list(pairs.values()), dtype=torch.float64)
    total = count.sum()
    of_word = torch.zeros(n, dtype=torch.float64).index_add_(0, index[0], count)
    # Contexts to the power 3/4, as in word2vec: rare contexts weigh less.
    of_context = of_word**0.75
    of_context /= of_context.sum()
    pmi = torch.log(count / (of_word[index[0]] * of_context[index[1]])).clamp_(min=0).float()
    matrix = torch.sparse_coo_tensor(index, pmi, (n, n), check_invariants=False).coalesce()
    rank = min(_RANK, n)
    basis = torch.randn((n, rank), generator=torch.Generator().manual_seed(seed + int(total) % 2**31))
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(torch.sparse.mm(matrix, torch.sparse.mm(matrix.t(), basis)))[0]
    left, values, _ = torch.linalg.svd(torch.sparse.mm(matrix.t(), basis).T, full_matrices=False)
    vectors = basis @ left * values.sqrt()
    return torch.nn.functional.normalize(vectors, dim=1)


def sparsemax(scores: torch.Tensor) -> torch.Tensor:
    """The nearest point of the probability simplex to each row of [n, k], in its dtype; rows are sorted, largest first.

    With k the largest number of leading scores for which 1 + k z_k > z_1 + … + z_k, the weights are
    max(z - (z_1 + … + z_k - 1) / k, 0).
    """
    ranks = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype)
    sums = scores.cumsum(1)
    size = (1 + ranks * scores > sums).sum(1, keepdim=True)
    threshold = (sums.gather(1, size - 1) - 1) / size
    return (scores - threshold).clamp(min=0)
