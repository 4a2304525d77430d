"""Scores against transformers' own forward, one sequence at a time."""

from __future__ import annotations

from signal import SIGINT, pthread_kill
from threading import Lock, local, main_thread
from time import sleep

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.packed import Packed
from llmkit.evaluation.answers import Answers
from llmkit.evaluation.prefix import Query
from llmkit.evaluation.scoring import Scorer
from llmkit.pipeline.journal import read_journal
from llmkit.pipeline.pool import torch_threads


def plain(model, query):
    """Log-probability and greediness from one full forward, head everywhere."""
    with torch.no_grad():
        logits = model(torch.tensor([query.tokens])).logits[0, -len(query.targets) :].float()
    logprobs = torch.log_softmax(logits, -1)
    picked = logprobs[torch.arange(len(query.targets)), torch.tensor(query.targets)]
    return float(picked.sum()), bool((logits.argmax(-1) == torch.tensor(query.targets)).all())


token = st.integers(0, 379)


@st.composite
def query_sets(draw):
    rows = [draw(st.lists(token, min_size=1, max_size=30))]
    for _ in range(draw(st.integers(0, 6))):
        stem = draw(st.sampled_from(rows))
        tail = draw(st.lists(token, min_size=1, max_size=12))
        rows.append((stem[: draw(st.integers(0, len(stem)))] + tail)[:90])
    return [
        Query(tuple(row), tuple(draw(st.lists(token, min_size=1, max_size=min(len(row), 4)))))
        for row in rows
        for _ in "ab"
    ]


@given(query_sets(), st.integers(1, 64), st.integers(0, 40), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_shared_equals_plain_for_any_tree_and_any_batch(reference, decoder, queries, batch_tokens, cost, threads):
    with torch_threads(threads):
        scorer = Scorer(decoder, batch_tokens, cost)
        scores = scorer.score(queries)
    for query, score in zip(queries, scores, strict=True):
        logprob, is_greedy = plain(reference, query)
        assert score.logprob == pytest.approx(logprob, abs=1e-4)
        assert score.is_greedy == is_greedy
    assert scorer.usage.tokens <= scorer.usage.tokens_unshared


def test_greedy_continuations_are_known_as_such(reference, decoder):
    prompt = torch.tensor([[5, 9, 200, 17]])
    made = reference.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    right = Query(tuple(made[:-1]), tuple(made[4:]))
    wrong = Query(tuple(made[:-1]), (*made[4:-1], (made[-1] + 1) % 380))
    assert [s.is_greedy for s in Scorer(decoder).score([right, wrong])] == [True, False]


def test_the_head_sees_only_the_scored_positions_and_a_prefix_is_computed_once(decoder):
    stem = tuple(range(3, 43))
    queries = [Query((*stem, 100 + i, 7), (letter,)) for i in range(10) for letter in (11, 12, 13, 14)]
    scorer = Scorer(decoder)
    scorer.score(queries)
    assert scorer.usage.tokens == 40 + 10 * 2
    assert scorer.usage.tokens_unshared == 10 * 42
    assert scorer.usage.head_rows == 10
    assert scorer.usage.forwards == 1


def test_every_position_of_a_long_text_is_scored_in_pieces(reference, decoder):
    ids = torch.randint(0, 380, (61,), generator=torch.Generator().manual_seed(1)).tolist()
    query = Query(tuple(ids[:-1]), tuple(ids[1:]))
    (score,) = Scorer(decoder, batch_tokens=25, logits_nbytes=4 * 380 * 7).score([query])  # seven rows at a time
    assert score.logprob == pytest.approx(plain(reference, query)[0], abs=2e-4)


@pytest.mark.parametrize(("ffn", "forwards"), [(64, 1), (4096, 2), (40_000, 3)])
def test_a_wide_model_computes_fewer_tokens_at_a_time(tmp_path, ffn, forwards):
    """Activations of a forward stay near 32 MiB, but it has 256 tokens or more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": ffn, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=40, max_position_embeddings=900, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    scorer = Scorer(load_decoder(open_checkpoint(tmp_path)))
    scorer.score([Query((7,) * 700, (3,))])
    assert scorer.usage.forwards == forwards


def test_progress_counts_the_arithmetic_of_what_is_computed(decoder):
    class Seen:
        total = done = n_calls = 0
        ended = False

        def begin(self, total, label, unit="B"):
            self.total, self.unit = total, unit

        def advance(self, n, note=""):
            self.done += n
            self.n_calls += 1

        def end(self):
            self.ended = True

    seen = Seen()
    scorer = Scorer(decoder, progress=seen)
    scorer.score([Query((1, 2, 3, i), (4,)) for i in range(5)])
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32)  # of two layers, the norms' included
    pairs = 5 * (1 + 2 + 3 + 4)  # tokens and what they see; four heads of eight
    assert scorer.usage.tokens == 5 * 4
    assert seen.total == 2 * weights * 20 + 4 * 32 * 2 * pairs
    assert (seen.done, seen.unit, seen.ended) == (seen.total, "FLOP", True)
    assert seen.n_calls > scorer.usage.forwards  # it moves within a forward, too


def test_half_precision_makes_no_ties(tiny_llama):
    """bf16 logits and log-softmax tie the best two answers often; float32 ones of bf16 hidden states do not."""
    decoder = load_decoder(open_checkpoint(tiny_llama), dtype="bfloat16")
    generator = torch.Generator().manual_seed(3)
    letters = (30, 31, 32, 33)
    stems = [tuple(torch.randint(0, 380, (12,), generator=generator).tolist()) for _ in range(60)]
    scores = Scorer(decoder).score([Query(stem, (letter,)) for stem in stems for letter in letters])
    values = [s.logprob for s in scores]
    assert all(len(set(values[i : i + 4])) == 4 for i in range(0, len(values), 4))
    rounded = torch.tensor(values).bfloat16().tolist()
    assert any(len(set(rounded[i : i + 4])) < 4 for i in range(0, len(values), 4))


def test_a_score_has_the_logit_of_its_first_token(reference, decoder):
    with torch.no_grad():
        logits = reference(torch.tensor([[5, 6, 7]])).logits[0, -1]
    scores = Scorer(decoder).score([Query((5, 6, 7), (8,)), Query((5, 6, 7, 9), (9, 4))])
    assert [s.logit for s in scores] == pytest.approx([float(logits[8]), float(logits[9])], abs=1e-4)


@pytest.fixture
def many():
    """Questions below passages below a stem, enough for forwards beside each other."""
    generator = torch.Generator().manual_seed(5)

    def ids(n):
        return tuple(torch.randint(0, 380, (n,), generator=generator).tolist())

    stem, passages = ids(20), [ids(15) for _ in range(6)]
    return [Query((*stem, *passages[i % 6], *ids(4 + i % 5)), (i % 380,)) for i in range(60)]


def test_streams_beside_each_other_score_as_one_does_and_always_the_same(decoder, many):
    found = []
    for threads in (1, 2, 2, 2):
        with torch_threads(threads):
            scorer = Scorer(decoder, 30, 4)
            found.append([s.logprob for s in scorer.score(many)])
            assert scorer.usage.tokens == 20 + 6 * 15 + sum(4 + i % 5 for i in range(60))
            assert torch.get_num_threads() == threads
    assert found[1] == found[2] == found[3]
    assert found[1] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_one_stream_throws_ends_the_other(decoder, many, monkeypatch, error):
    hidden, calls = type(decoder).hidden, []

    def failing(self, *given, **named):
        calls.append(len(calls))
        if len(calls) == 6:
            raise error("enough")
        return hidden(self, *given, **named)

    monkeypatch.setattr(type(decoder), "hidden", failing)
    with torch_threads(2), pytest.raises(error, match="enough"):
        Scorer(decoder, 30, 4).score(many)
    assert len(calls) < 10


@pytest.mark.parametrize("layer", [2, 3])
def test_an_interruption_finishes_the_forwards_that_are_more_than_half_done(
    tiny_llama, many, monkeypatch, tmp_path, layer
):
    from transformers import AutoConfig, AutoModelForCausalLM

    four = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama, num_hidden_layers=4))
    four.save_pretrained(tmp_path / "four")
    scorer = Scorer(load_decoder(open_checkpoint(tmp_path / "four")), 30, 4, answers=Answers(tmp_path / "kept"))
    forward, attend, read, asked = Scorer.forward_in_memory, Packed.attend, local(), []
    first = Lock()

    def noting(self, stretches, *given, **named):
        read.queries = {query for segment, _, _ in stretches for _, query, _ in segment.reads}
        return forward(self, stretches, *given, **named)

    def interrupting(self, at, *given):
        if at == layer and read.queries and first.acquire(blocking=False):
            asked.extend(read.queries)
            sleep(0.1)  # until both streams have been started: a thread is not waited for before
            pthread_kill(main_thread().ident, SIGINT)
            assert scorer._forwards.stop.wait(30)
        return attend(self, at, *given)

    monkeypatch.setattr(Scorer, "forward_in_memory", noting)
    monkeypatch.setattr(Packed, "attend", interrupting)
    with torch_threads(2), pytest.raises(KeyboardInterrupt):
        scorer.score(many)
    scorer.answers.close()
    kept = {query for line in read_journal(tmp_path / "kept") for query, *_ in line.get("result", {}).get("reads", [])}
    assert asked
    assert kept & set(asked) == (set(asked) if layer == 3 else set())
