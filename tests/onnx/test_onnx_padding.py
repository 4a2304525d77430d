"""Padding on either side, and between calls: every row of a batch is what it is alone.

What each row has to be is the torch decoder's, one row without padding: that is held to transformers elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from rotation import EVERY_WAY, rotated
from tiny_graphs import CASES, PLUGINS, is_refused, made

from llmkit.decoder.kv import KVCache

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
TOLERANCE = 1e-5
# Of each row: padding before, tokens and padding after, in the first call and in the second; then come single tokens.
CALLS = [[(0, 9, 3), (2, 6, 4), (0, 12, 0), (7, 5, 0)], [(0, 3, 2), (0, 5, 0), (1, 2, 2), (0, 0, 5)]]
N_STEPS = 3


def prompts(ends, n_tokens, n_rows):
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(5, 60, (n_rows, n_tokens), generator=generator)
    ids[:, 2 : 2 + len(ends)] = torch.tensor(ends, dtype=ids.dtype)
    return ids


def laid_out(rows, call, taken):
    """Ids and mask of a call, the next tokens of each row between its padding, which is any token."""
    ids, mask = [], []
    for row, (before, n, after), start in zip(rows, call, taken, strict=True):
        ids.append(torch.cat([row.new_full((before,), 7), row[start : start + n], row.new_full((after,), 8)]))
        mask.append(torch.tensor([0] * before + [1] * n + [0] * after))
    return torch.stack(ids), torch.stack(mask)


def tokens_of(logits, call):
    return [logits[i, before : before + n] for i, (before, n, _) in enumerate(call)]


def computed(decoder, rows, calls, n_steps):
    """The logits of each row's tokens, in a batch with padding."""
    taken, cache, mask = [0] * len(rows), KVCache(), None
    found = [[] for _ in rows]
    for call in [*calls, *[[(0, 1, 0)] * len(rows)] * n_steps]:
        ids, new = laid_out(rows, call, taken)
        mask = new if mask is None else torch.cat([mask, new], 1)
        logits = decoder(ids, cache, mask)
        for parts, part in zip(found, tokens_of(logits, call), strict=True):
            parts.append(part)
        taken = [t + n for t, (_, n, _) in zip(taken, call, strict=True)]
    return [torch.cat(parts) for parts in found]


def check(name, variant=None, attention="attention", calls=CALLS):
    found, wanted, ends = made(name, variant, attention=attention)
    # Some look at the length of the whole, or of the prompt, so that calls are not one computation.
    limit = wanted.exact_sharing_limit
    is_whole = limit is not None and limit < 24
    calls, n_steps = (calls[:1], 0) if is_whole and not ends else (calls, N_STEPS)
    rows = prompts(ends, 24, len(calls[0]))
    alone = [wanted(row[None, : sum(c[i][1] for c in calls) + n_steps])[0] for i, row in enumerate(rows)]
    for what, decoder in (("ONNX Runtime", found), ("torch", wanted)):
        scale = max(1.0, max(float(a.abs().max()) for a in alone))
        each = computed(decoder, rows, calls, n_steps)
        differences = [float((a - b).abs().max()) / scale for a, b in zip(each, alone, strict=True)]
        assert max(differences) <= TOLERANCE, (what, differences)


# Of the other variants, test_onnx_contract.py has a batch padded on the left.
@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name, variant in CASES if variant is None or name in EVERY_WAY],
    ids=lambda x: str(x).replace(" ", "-"),
)
def test_rows_of_a_padded_batch(name, variant):
    check(name, variant)


@pytest.mark.parametrize(
    ("name", "attention"), [(n, a) for n, a in rotated(PLUGINS, ["gqa", "flash", "mha"]) if not is_refused(n, a)]
)
def test_with_other_ops_for_attention(name, attention):
    check(name, attention=attention)


@pytest.mark.parametrize(("name", "attention"), [("llama", "attention"), ("llama", "gqa"), ("llama", "flash"),
                                                 ("mistral", "flash"), ("gpt2", "flash"), ("gpt2", "mha")])  # fmt: skip
def test_a_row_that_has_nothing_yet(name, attention):
    """A conversation that joins a batch later: its first call is all padding."""
    check(name, attention=attention, calls=[[(0, 9, 3), (12, 0, 0), (0, 0, 12)], [(1, 4, 0), (0, 5, 0), (2, 3, 0)]])
