"""BPE of ours against SentencePiece's and the tokenizers library's."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from llmkit.tokenization.bpe import apply_bpe, by_rank, by_score, implied_merges, scores_of_merges, tied_pairs
from llmkit.tokenization.byte_level import from_bytes, to_bytes
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.sentencepiece_model import SentencePieceModel

TEXT = st.text(alphabet="theoransid ,19()世界和平人工作", max_size=24)


class Trained:
    """A tokenizer of ours beside the library's; a class of its own, so that a failing example prints short."""

    def __init__(self, ours, theirs, fast=None):
        self.ours, self.theirs, self.fast = ours, theirs, fast

    def __repr__(self):
        return "trained"


@pytest.fixture(scope="module")
def sp(world):
    data = world.sp_model(world.ENGLISH + world.CHINESE, 420)
    model = SentencePieceModel.parse(data, "test")
    return Trained(model, SentencePieceProcessor(model_proto=data), Tokenizer.from_str(world.fast_of(data)))


@pytest.fixture(scope="module")
def bl(world):
    text = world.byte_level(world.ENGLISH + world.CHINESE, 420)
    return Trained(FastTokenizer.parse(text.encode(), "test"), Tokenizer.from_str(text))


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_by_score_is_sentencepiece(sp, text):
    model, theirs = sp.ours, sp.theirs
    found = apply_bpe("▁" + text.replace(" ", "▁"), by_score(model.scores)).parts if text else ()
    assert list(found) == list(theirs.encode(text, out_type=str))


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="theoransid世界和平人工作", min_size=1, max_size=16))
def test_by_rank_is_the_tokenizers_library(bl, text):
    ranks = {pair: i for i, pair in enumerate(bl.ours.merges)}
    assert list(apply_bpe(from_bytes(text.encode()), by_rank(ranks)).parts) == bl.theirs.encode(text).tokens


def test_a_token_alone_has_the_trace_it_has_in_a_text(sp):
    model = sp.ours
    priority = by_score(model.scores)
    text = "the other mother bothered her brother 人工智能的发展 in 1970"
    in_text = apply_bpe("▁" + text.replace(" ", "▁"), priority)
    alone = [made for part in in_text.parts for made in apply_bpe(part, priority).made]
    assert sorted(alone) == sorted(in_text.made)
    assert all(apply_bpe(part, priority).parts == (part,) for part in in_text.parts)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_implied_merges_agree_where_no_scores_are_equal(sp, text):
    assert sp.fast.encode(text).ids == sp.theirs.encode(text)


def test_trained_scores_are_not_tied(sp):
    assert tied_pairs(implied_merges(sp.ours.scores, sp.ours.ids), sp.ours.scores) == 0


def test_scores_from_merges_give_back_the_order(sp):
    model = sp.ours
    merges = implied_merges(model.scores, model.ids)
    scores = scores_of_merges(merges)
    made = [t for t in model.scores if t in scores]
    assert sorted(made, key=lambda t: -scores[t]) == sorted(made, key=lambda t: -model.scores[t])


def test_byte_spelling_is_that_of_the_tokenizers_library():
    from tokenizers.pre_tokenizers import ByteLevel

    data = bytes(range(256))
    assert sorted(from_bytes(data)) == sorted(ByteLevel.alphabet())
    assert to_bytes(from_bytes(data)) == data
    assert to_bytes("世") is None
    rng = random.Random(0)
    text = "".join(chr(rng.choice([*range(32, 500), *range(0x4E00, 0x4E80), 0x1F600])) for _ in range(200))
    spelled = "".join(t for t, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))
    assert from_bytes(text.encode()) == spelled
