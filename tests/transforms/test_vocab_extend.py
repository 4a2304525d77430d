"""Extending a SentencePiece vocabulary: the tokenizer against SentencePiece, ids, files, configs, the real models."""

from __future__ import annotations

import csv
import json

import delta_world
import pytest
import vocab_world as world
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

import llmkit
from llmkit.errors import InputError, RequirementError
from llmkit.transforms import vocab

SAMPLES = [
    "The quick brown fox jumps over the lazy dog in 1970.", "人工智能的发展正在改变世界。",
    "def f(x):\n\treturn x ** 2  # 平方",
    "🙂 naïve café 👩‍🚀 ﷽", "  two  spaces ", "工人工人人工工人", "a" * 40, "1971 1970 197 19 7", "",
]  # fmt: skip
ANY_TEXT = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="the ors197 人工世界和平中国的", max_size=30),
    st.binary(max_size=40).map(lambda b: b.decode("utf-8", "replace")),
)


class Merged:
    """An extended model beside the same merge made by hand; a class, so that failing examples print short."""

    def __init__(self, folder, scores=None):
        base = world.sp_model(world.ENGLISH, 360)
        chinese = world.sp_model(world.CHINESE, 420, model_type="unigram")
        (folder / "zh.model").write_bytes(chinese)
        self.base, self.chinese = SentencePieceProcessor(model_proto=base), SentencePieceProcessor(model_proto=chinese)
        self.n_base = self.base.vocab_size()
        self.ckpt = world.model(folder / "model", self.n_base, world.sp_files(base), hidden=16)
        self.out = vocab.extend(self.ckpt, folder / "zh.model", scores=scores)
        have = {self.base.id_to_piece(i) for i in range(self.n_base)}
        pieces = [self.chinese.id_to_piece(i) for i in range(self.chinese.vocab_size())]
        self.pieces = [p for p in pieces if p not in have and not p.startswith("<0x")]
        self.theirs = SentencePieceProcessor(model_proto=world.appended(base, self.pieces))
        self.ours = SentencePieceProcessor(model_proto=self.out.files["tokenizer.model"].read())
        self.fast = Tokenizer.from_str(self.out.files["tokenizer.json"].read().decode())

    def __repr__(self):
        return "merged"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return Merged(tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    return Merged(tmp_path_factory.mktemp("after"), "after")


def test_pieces_and_ids(merged):
    n = merged.n_base
    assert merged.pieces
    assert [merged.ours.id_to_piece(i) for i in range(n)] == [merged.base.id_to_piece(i) for i in range(n)]
    assert [merged.ours.id_to_piece(i) for i in range(n, merged.ours.vocab_size())] == merged.pieces
    assert {merged.ours.get_score(i) for i in range(n, merged.ours.vocab_size())} == {0.0}
    assert merged.fast.get_vocab() == {merged.ours.id_to_piece(i): i for i in range(merged.ours.vocab_size())}


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_equals_sentencepiece_id_for_id(merged, text):
    for sample in (text, *SAMPLES):
        assert merged.ours.encode(sample) == merged.theirs.encode(sample)
        assert merged.ours.decode(merged.ours.encode(sample)) == merged.theirs.decode(merged.theirs.encode(sample))


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=("Cs",)), max_size=30))
def test_text_comes_back(merged, text):
    # SentencePiece itself writes a space as ▁, so a ▁ of the text does not come back, and drops NUL.
    if "\0" not in text:
        assert merged.ours.decode(merged.ours.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_slow_and_fast_agree_with_scores_after(after, text):
    for sample in (text, *SAMPLES):
        if "\0" not in sample and "▁" not in sample:
            assert after.fast.encode(sample).ids == after.ours.encode(sample)


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
def test_with_scores_after_new_pieces_only_join_old_ones(after, text):
    old = {i: after.base.id_to_piece(i) for i in range(after.n_base)}
    cut = vocab_cut(after)
    joined = [part for i in after.ours.encode(text) for part in ([i] if i in old else cut(i))]
    assert joined == after.base.encode(text)


def vocab_cut(case):
    """New id -> ids of its old pieces, by SentencePiece with a ▁ in front taken away."""

    def cut(i):
        piece = case.ours.id_to_piece(i)
        ids = case.base.encode(piece.removeprefix("▁"))
        if not piece.startswith("▁") and case.base.id_to_piece(ids[0]) == "▁":
            ids = ids[1:]
        return ids

    return cut


def test_equal_scores_are_said_and_measured(merged, after):
    said = [w for w in merged.out.warnings if "equal scores" in w]
    assert len(said) == 1
    assert "--scores after" in said[0]
    assert not any("equal scores" in w for w in after.out.warnings)
    assert merged.out.history[-1]["new_tokens"] == len(merged.pieces)


def test_config_and_files_follow(tmp_path):
    base = world.sp_model(world.ENGLISH, 360)
    n = SentencePieceProcessor(model_proto=base).vocab_size()
    files = world.sp_files(base)
    fast = Tokenizer.from_str(files["tokenizer.json"])
    fast.add_special_tokens(["[PAD]"])
    config = json.loads(files["tokenizer_config.json"])
    config["added_tokens_decoder"][str(n)] = {"content": "[PAD]", "special": True}
    generation = {"bos_token_id": 1, "eos_token_id": [2, n], "pad_token_id": n, "max_length": n}
    files |= {
        "tokenizer.json": fast.to_str(), "tokenizer_config.json": json.dumps(config),
        "added_tokens.json": json.dumps({"[PAD]": n}), "generation_config.json": json.dumps(generation),
    }  # fmt: skip
    ckpt = world.model(tmp_path / "m", n + 1, files, hidden=16, pad_token_id=n, eos_token_id=2)
    (tmp_path / "zh.model").write_bytes(world.sp_model(world.CHINESE, 420, model_type="unigram"))
    out = vocab.extend(ckpt, tmp_path / "zh.model", init="zero", pad_to_multiple=64)
    total = out.history[-1]["tokens"]
    k = out.history[-1]["new_tokens"]
    assert total == n + k + 1
    assert out.config["vocab_size"] == -(-total // 64) * 64 == world.rows(out).shape[0]
    assert (out.config["pad_token_id"], out.config["eos_token_id"]) == (n + k, 2)
    found = json.loads(out.files["generation_config.json"].read())
    assert found == {"bos_token_id": 1, "eos_token_id": [2, n + k], "pad_token_id": n + k, "max_length": n}
    assert json.loads(out.files["added_tokens.json"].read()) == {"[PAD]": n + k}
    decoder = json.loads(out.files["tokenizer_config.json"].read())["added_tokens_decoder"]
    assert decoder[str(n + k)]["content"] == "[PAD]"
    tokenizer = Tokenizer.from_str(out.files["tokenizer.json"].read().decode())
    assert tokenizer.token_to_id("[PAD]") == n + k
    assert tokenizer.get_vocab_size() == total
    old, new = world.rows(ckpt), world.rows(out)
    assert new[:n].equal(old[:n])
    assert new[n + k].equal(old[n])
    assert not new[n : n + k].any()
    assert not new[total:].any()
    llmkit.plan(out, tmp_path / "out")


def test_transformers_loads_the_result(merged, tmp_path):
    from transformers import AutoTokenizer

    llmkit.save(merged.out, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(loaded) == merged.ours.vocab_size()
    for text in ("the other mother", "世界和平", "over and over 人工智能"):
        assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text


def test_staged_is_composed(tmp_path):
    base_sp = world.sp_model(world.ENGLISH, 360)
    n = SentencePieceProcessor(model_proto=base_sp).vocab_size()
    (tmp_path / "zh.model").write_bytes(world.sp_model(world.CHINESE, 420, model_type="unigram"))
    base = world.model(tmp_path / "base", n, world.sp_files(base_sp), hidden=16)
    tuned_state = delta_world.tuned_of(delta_world.weights(n, hidden=16))
    tuned = delta_world.checkpoint(tmp_path / "tuned", tuned_state)
    from llmkit.transforms import delta

    made = delta.make(base, tuned, profile="vicuna")
    llmkit.save(made, tmp_path / "delta")
    opened = llmkit.open_checkpoint(tmp_path / "delta")
    for init in ("mean", "pieces", "normal", "zero"):
        composed = vocab.extend(delta.apply(base, opened), tmp_path / "zh.model", init=init, pad_to_multiple=8)
        llmkit.save(composed, tmp_path / f"composed-{init}")
        if not (tmp_path / "first").exists():
            llmkit.save(delta.apply(base, opened), tmp_path / "first")
        first = llmkit.open_checkpoint(tmp_path / "first")
        staged = vocab.extend(first, tmp_path / "zh.model", init=init, pad_to_multiple=8)
        llmkit.save(staged, tmp_path / f"staged-{init}")
        for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"):
            one, two = (tmp_path / f"{kind}-{init}" / name for kind in ("composed", "staged"))
            assert one.read_bytes() == two.read_bytes(), (init, name)


def test_what_cannot_be_is_refused(tmp_path, merged):
    with pytest.raises(InputError, match="brings no token"):
        vocab.extend(merged.out, merged.ckpt.origin / "tokenizer.model")
    with pytest.raises(InputError, match="no such file") as caught:
        vocab.extend(merged.ckpt, tmp_path / "absent.model")
    assert "sp.model" in caught.value.hint
    with pytest.raises(InputError, match="unknown initialization 'peices'") as caught:
        vocab.extend(merged.ckpt, tmp_path, init="peices")
    assert caught.value.hint == "did you mean pieces?"
    bare = delta_world.checkpoint(tmp_path / "bare", delta_world.weights(96))
    (tmp_path / "words.txt").write_text("hello\n")
    with pytest.raises(RequirementError, match="no tokenizer files"):
        vocab.extend(bare, tmp_path / "words.txt")
    small = world.model(tmp_path / "small", 96, world.sp_files(world.sp_model(world.ENGLISH, 360)), hidden=16)
    with pytest.raises(RequirementError, match="the embedding 96 rows"):
        vocab.extend(small, tmp_path / "words.txt")


def test_a_unigram_model_keeps_the_scores_of_the_source(tmp_path):
    base = world.sp_model(world.ENGLISH, 360, model_type="unigram")
    n = SentencePieceProcessor(model_proto=base).vocab_size()
    ckpt = world.model(tmp_path / "m", n, world.sp_files(base, fast=False), hidden=16)
    zh = world.sp_model(world.CHINESE, 420, model_type="unigram")
    (tmp_path / "zh.model").write_bytes(zh)
    out = vocab.extend(ckpt, tmp_path / "zh.model", init="pieces")
    ours, theirs = (
        SentencePieceProcessor(model_proto=out.files["tokenizer.model"].read()),
        SentencePieceProcessor(model_proto=zh),
    )
    assert ours.get_score(ours.piece_to_id("世界")) == theirs.get_score(theirs.piece_to_id("世界"))
    assert len(ours.encode("世界和平")) < len(SentencePieceProcessor(model_proto=base).encode("世界和平"))
    with pytest.raises(RequirementError, match="score 0 has probability 1"):
        vocab.extend(ckpt, tmp_path / "zh.model", scores="zero")


def test_the_real_merge(shared, tmp_path):
    folder = shared / "tokenizers"
    base = (folder / "llama.model").read_bytes()
    ckpt = world.model(tmp_path / "m", 32000, {"tokenizer.model": base}, hidden=8)
    out = vocab.extend(ckpt, folder / "chinese_sp.model", init="pieces")
    figures = out.history[-1]
    assert (figures["tokens"], figures["new_tokens"], figures["rows"]) == (49953, 17953, 49953)
    assert figures["reachable"] == 17608
    assert out.config["vocab_size"] == 49953
    old, chinese = (SentencePieceProcessor(model_file=str(folder / n)) for n in ("llama.model", "chinese_sp.model"))
    ours = SentencePieceProcessor(model_proto=out.files["tokenizer.model"].read())
    have = {old.id_to_piece(i) for i in range(32000)}
    assert [ours.id_to_piece(i) for i in range(32000)] == [old.id_to_piece(i) for i in range(32000)]
    pieces = [p for p in map(chinese.id_to_piece, range(20000)) if p not in have]
    theirs = SentencePieceProcessor(model_proto=world.appended(base, pieces))
    cells = []
    for path in sorted((shared / "data" / "ceval").glob("*/*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            cells += [cell for row in csv.reader(file) for cell in row if cell.strip()]
    for text in [*SAMPLES, *cells]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    # Tokens of C-Eval's questions, answers and explanations (dev and val of ten subjects) before and after.
    n_chars = sum(map(len, cells))
    assert (n_chars, sum(len(old.encode(c)) for c in cells), sum(len(ours.encode(c)) for c in cells)) == (
        36744, 51202, 25271,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("tokenizer.model", {"tokenizer_class": "ChatGLMTokenizer"}, "its code numbers special tokens from the end of"),
        ("ice_text.model", {"num_image_tokens": 20000}, "its code puts 20000 ids before those of ice_text.model"),
    ],
)
def test_ids_that_code_fixes_are_not_moved(tmp_path, name, config, message):
    data = world.sp_model(world.ENGLISH, 420)
    files = {name: data, "tokenizer_config.json": json.dumps(config)}
    ckpt = world.model(tmp_path / "m", 440, files)
    (tmp_path / "words.txt").write_text("hello\n")
    with pytest.raises(RequirementError, match=message) as caught:
        vocab.extend(ckpt, tmp_path / "words.txt")
    assert "tokenizer.json" in caught.value.hint
