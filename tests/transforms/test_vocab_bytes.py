"""Byte-level BPE with real merges, added tokens and tiktoken files, against the tokenizers library."""

from __future__ import annotations

import base64
import json

import pytest
import vocab_world as world
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import llmkit
from llmkit.errors import InputError, RequirementError
from llmkit.tokenization.byte_level import to_bytes
from llmkit.tokenization.fast import FastTokenizer
from llmkit.transforms import vocab

ANY_TEXT = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="the orsaнид197 人工世界和平中国的\n", max_size=30),
    st.binary(max_size=40).map(lambda b: b.decode("utf-8", "replace")),
)


class Case:
    """A byte-level model, extended by one kind of source."""

    def __init__(self, folder, kind):
        self.old_json = world.byte_level(world.ENGLISH, 380, ["<|end|>", "<|user|>"])
        self.old = Tokenizer.from_str(self.old_json)
        self.n = self.old.get_vocab_size()
        donor_json = world.byte_level(world.CHINESE + ["другой мир другой"] * 20, 520, ["<|zh|>"])
        donor = FastTokenizer.parse(donor_json.encode(), "donor")
        config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
        merges = FastTokenizer.parse(self.old_json.encode(), "old").merges
        files = {
            "tokenizer.json": self.old_json, "tokenizer_config.json": config,
            "vocab.json": json.dumps(FastTokenizer.parse(self.old_json.encode(), "old").vocab),
            "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        }  # fmt: skip
        self.ckpt = world.model(folder / "m", self.n, files, hidden=16, eos_token_id=0)
        self.wanted = [a + b for a, b in donor.merges if a + b not in self.old.get_vocab()]
        if kind == "json":
            source = folder / "tokenizer.json"
            source.write_text(donor_json)
        elif kind == "tiktoken":
            source = folder / "zh.tiktoken"
            tokens = [bytes([b]) for b in range(256)] + [to_bytes(a + b) for a, b in donor.merges]
            source.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
        else:
            source = folder / "zh.model"
            data = world.sp_model(world.CHINESE, 420, model_type="unigram")
            source.write_bytes(data)
        self.out = vocab.extend(self.ckpt, source, init="pieces")
        self.made = FastTokenizer.parse(self.out.files["tokenizer.json"].read(), "made")
        self.new = Tokenizer.from_str(self.out.files["tokenizer.json"].read().decode())

    def __repr__(self):
        return "case"


@pytest.fixture(scope="module", params=["json", "tiktoken", "sp"])
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param), request.param)


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_new_merges_only_join_old_tokens(case, text):
    """Cutting each new token as its merges say gives the old tokens: old text is as before where none applies."""
    old, new = case.old.encode(text), case.new.encode(text)
    merge_of = {
        a + b: (a, b) for a, b in case.made.merges[len(FastTokenizer.parse(case.old_json.encode(), "o").merges) :]
    }

    def cut(token):
        if case.made.vocab[token] < case.n:
            return [token]
        left, right = merge_of[token]
        return cut(left) + cut(right)

    assert [part for token in new.tokens for part in cut(token)] == old.tokens
    if not any(i >= case.n for i in new.ids):
        assert new.ids == old.ids
    assert case.new.decode(new.ids, skip_special_tokens=False) == case.old.decode(old.ids, skip_special_tokens=False)


def test_old_ids_and_merges_stay(case):
    before = FastTokenizer.parse(case.old_json.encode(), "old")
    assert case.made.merges[: len(before.merges)] == before.merges
    assert {t: i for t, i in case.made.vocab.items() if i < case.n} == dict(before.vocab)
    assert sorted(case.made.vocab.values()) == list(range(case.out.history[-1]["tokens"]))
    assert len(case.made.merges) > len(before.merges)


def test_every_wanted_token_comes_out_whole(case):
    figures = case.out.history[-1]
    whole = 0
    for token, i in case.made.vocab.items():
        if i < case.n:
            continue
        try:
            text = to_bytes(token).decode()
        except UnicodeDecodeError:
            continue
        whole += case.new.encode(text).ids == [i]
    assert whole == figures["reachable"] > 20
    # SentencePiece learns across what a byte-level tokenizer cuts first, as 70年: such tokens are counted and said.
    crossing = [note for note in case.out.notes if "cross a border of the pre-tokenizer" in note]
    assert len(crossing) == (figures["reachable"] < figures["tested"])
    assert figures["reachable"] >= 0.9 * figures["tested"]
    assert any(f"{whole} of the {figures['tested']}" in note for note in case.out.notes)
    assert (
        len(case.new.encode("人工智能的发展正在改变世界").ids)
        < len(case.old.encode("人工智能的发展正在改变世界").ids) / 2
    )


def test_slow_files_say_the_same(case):
    assert json.loads(case.out.files["vocab.json"].read()) == dict(case.made.vocab)
    lines = case.out.files["merges.txt"].read().decode().splitlines()
    assert lines[0] == "#version: 0.2"
    assert [tuple(line.split(" ")) for line in lines[1:]] == list(case.made.merges)


def test_pieces_are_the_rows_of_the_old_tokenization(case):
    old, new = world.rows(case.ckpt).float(), world.rows(case.out).float()
    texts = {i: to_bytes(t) for t, i in case.made.vocab.items() if i >= case.n}
    for i, data in texts.items():
        try:
            ids = case.old.encode(data.decode()).ids
        except UnicodeDecodeError:
            continue
        expected = old[ids].mean(0)
        assert (new[i] - expected).abs().max() <= 2**-10 * expected.abs().max()


def test_transformers_reads_it(case, tmp_path):
    from transformers import AutoTokenizer

    llmkit.save(case.out, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the other 人工智能的发展"
    assert loaded(text, add_special_tokens=False)["input_ids"] == case.new.encode(text).ids
    assert loaded.decode(case.new.encode(text).ids) == text


@pytest.mark.parametrize("kind", ["byte_level", "sp", "sp-slow"])
def test_words_become_added_tokens(tmp_path, kind):
    from transformers import AutoTokenizer

    words = ["<|tool|>", "区块链", "hello world"]
    (tmp_path / "words.txt").write_text("\n".join([*words, "", words[0]]) + "\n")
    if kind == "byte_level":
        files = {"tokenizer.json": world.byte_level(world.ENGLISH, 380, ["<|end|>"])}
    else:
        files = world.sp_files(world.sp_model(world.ENGLISH, 360), fast=kind == "sp")
    n = 380 if kind == "byte_level" else 0
    if not n:
        from sentencepiece import SentencePieceProcessor

        n = SentencePieceProcessor(model_proto=files["tokenizer.model"]).vocab_size()
    ckpt = world.model(tmp_path / "m", n, files, hidden=16)
    out = vocab.extend(ckpt, tmp_path / "words.txt", init="pieces")
    assert out.history[-1]["new_tokens"] == 3
    if kind == "sp-slow":
        assert json.loads(out.files["added_tokens.json"].read()) == {w: n + i for i, w in enumerate(words)}
        decoder = json.loads(out.files["tokenizer_config.json"].read())["added_tokens_decoder"]
        assert [decoder[str(n + i)]["content"] for i in range(3)] == words
        return
    llmkit.save(out, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = loaded("x<|tool|>y区块链z hello world", add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i >= n] == [n, n + 1, n + 2]


@pytest.mark.parametrize("kind", ["byte_level", "sp"])
def test_words_can_be_real_pieces(tmp_path, kind):
    words = ["区块链", "blockchain", "工作人员"]
    (tmp_path / "words.txt").write_text("\n".join(words))
    if kind == "byte_level":
        files = {"tokenizer.json": world.byte_level(world.ENGLISH, 380)}
        n = Tokenizer.from_str(files["tokenizer.json"]).get_vocab_size()
    else:
        files = world.sp_files(world.sp_model(world.ENGLISH, 360))
        n = Tokenizer.from_str(files["tokenizer.json"]).get_vocab_size()
    out = vocab.extend(world.model(tmp_path / "m", n, files, hidden=16), tmp_path / "words.txt", as_="pieces")
    made = Tokenizer.from_str(out.files["tokenizer.json"].read().decode())
    assert any("pieces between" in note for note in out.notes)
    for word in words:
        assert len([i for i in made.encode("x" + word).ids if i >= n]) == 1
    assert out.history[-1]["reachable"] >= len(words)


def test_a_tiktoken_tokenizer_alone_is_refused(tmp_path):
    ranks = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    ckpt = world.model(tmp_path / "m", 256, {"qwen.tiktoken": ranks}, hidden=16)
    (tmp_path / "words.txt").write_text("one\n")
    with pytest.raises(RequirementError, match=r"only qwen\.tiktoken, whose special tokens"):
        vocab.extend(ckpt, tmp_path / "words.txt")


def test_a_broken_source_is_refused(tmp_path, case):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        vocab.extend(case.ckpt, tmp_path / "bad.json")
    (tmp_path / "bad.tiktoken").write_text("QUI= 1\nnonsense\n")
    with pytest.raises(InputError, match="line 2: expected base64 and a rank"):
        vocab.extend(case.ckpt, tmp_path / "bad.tiktoken")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match="has no tokens"):
        vocab.extend(case.ckpt, tmp_path / "empty.txt")
