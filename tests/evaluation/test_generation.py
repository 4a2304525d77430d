"""Answers that grow side by side from shared prefixes, against transformers' forward, one prompt at a time."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.decoder.sampling import Sampling
from llmkit.evaluation.generation import Request
from llmkit.evaluation.scoring import Scorer


class Letters:
    """A tokenizer's decoding where each id is one character."""

    def decode(self, ids):
        return "".join(chr(0x4E00 + i) for i in ids)


def continued(model, tokens, n, eos):
    """Greedy decoding by whole forwards."""
    made: list[int] = []
    while len(made) < n:
        with torch.no_grad():
            made.append(int(model(torch.tensor([[*tokens, *made]])).logits[0, -1].argmax()))
        if made[-1] == eos:
            return made[:-1]
    return made


token = st.integers(3, 379)


@st.composite
def prompt_sets(draw):
    rows = [draw(st.lists(token, min_size=1, max_size=30))]
    for _ in range(draw(st.integers(0, 6))):
        stem = draw(st.sampled_from(rows))
        rows.append((stem[: draw(st.integers(0, len(stem)))] + draw(st.lists(token, max_size=8)))[:60] or [7])
    return [tuple(row) for row in rows]


@given(prompt_sets(), st.integers(1, 64), st.integers(0, 40), st.sampled_from([40, 200, 8192]))
@settings(max_examples=12, deadline=None)
def test_any_tree_and_any_batch_give_the_texts_of_each_prompt_alone(
    reference, decoder, prompts, batch_tokens, cost, kept
):
    eos = 17
    alone = [continued(reference, list(p), 6, eos) for p in prompts]
    stop = Letters().decode([alone[0][2]]) if len(alone[0]) > 2 else "no stop"
    requests = [Request(i, p, (stop,), 6, Sampling()) for i, p in enumerate(prompts)]
    scorer = Scorer(decoder, batch_tokens, cost, kept_tokens=kept)
    assert scorer.generate(requests, Letters(), [eos]) == [Letters().decode(ids).split(stop)[0] for ids in alone]


def test_a_prefix_is_computed_once_and_finished_answers_leave_the_batch(decoder, monkeypatch):
    seen = []
    plain = type(decoder).hidden

    def hidden(self, ids, cache=None, mask=None):
        seen.append(ids.numel())
        return plain(self, ids, cache, mask)

    monkeypatch.setattr(type(decoder), "hidden", hidden)
    stem = tuple(range(3, 60))
    requests = [Request(i, (*stem, 100 + i), (), 4, Sampling()) for i in range(8)]
    ends_first = Scorer(decoder).generate(requests, Letters(), [])[:7]
    stops = [{text[0] for text in ends_first}, set()]
    seen.clear()
    requests = [Request(i, r.tokens, tuple(stops[i == 7]), 4, Sampling()) for i, r in enumerate(requests)]
    Scorer(decoder).generate(requests, Letters(), [])
    assert seen == [len(stem), 8, 1, 1, 1]
