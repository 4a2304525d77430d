"""Trimming a vocabulary: text of the corpus is cut into the same tokens, rows follow the ids."""

from __future__ import annotations

import json

import pytest
import vocab_world as world
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

import llmkit
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import InputError
from llmkit.tokenization.to_gguf import vocabulary_metadata
from llmkit.transforms import vocab
from llmkit.transforms.vocab.config_ids import mentioned_ids, renumbered_generation

CORPUS = [
    "the quick brown fox",
    "工人在工厂里工作",
    "in 1970 there were 197",
    "she sells sea shells",
    "other mother 🙂",
]
WORDS = ["the", "quick", "brown", "fox", "工人在工厂里工作", "in 1970", "there", "she sells", "sea", "shells"]


class Case:
    """A model of one kind of tokenizer, trimmed by the corpus."""

    def __init__(self, folder, kind):
        self.kind = kind
        lines = world.ENGLISH + world.CHINESE
        if kind == "byte_level":
            files = {"tokenizer.json": world.byte_level(lines, 500, ["<|end|>", "<|user|>"])}
            tokenizer = Tokenizer.from_str(files["tokenizer.json"])
            tokenizer.add_tokens(["[extra]"])
            files["tokenizer.json"] = tokenizer.to_str()
            self.n = tokenizer.get_vocab_size()
        else:
            model_type = "unigram" if kind == "unigram" else "bpe"
            data = world.sp_model(lines, 520, model_type=model_type)
            files = world.sp_files(data, fast=kind == "sp")
            self.n = SentencePieceProcessor(model_proto=data).vocab_size()
        (folder / "corpus.txt").write_text("\n".join(CORPUS))
        files["generation_config.json"] = json.dumps({"eos_token_id": [2, self.n - 1], "suppress_tokens": [7, 300]})
        self.ckpt = world.model(folder / "m", self.n, files, hidden=16, eos_token_id=self.n - 2)
        self.out = vocab.trim(self.ckpt, folder / "corpus.txt", keep_ids=[self.n - 3])
        self.before, self.after = self.encoders(self.ckpt), self.encoders(self.out)

    def encoders(self, ckpt):
        found = []
        if "tokenizer.model" in ckpt.files:
            sp = SentencePieceProcessor(model_proto=ckpt.files["tokenizer.model"].read())
            found.append((sp.encode, sp.id_to_piece, sp.decode))
        if "tokenizer.json" in ckpt.files:
            fast = Tokenizer.from_str(ckpt.files["tokenizer.json"].read().decode())
            found.append((lambda text: fast.encode(text).ids, fast.id_to_token, fast.decode))
        return found

    def __repr__(self):
        return self.kind


@pytest.fixture(scope="module", params=["sp", "sp-slow", "unigram", "byte_level"])
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def test_the_corpus_is_cut_as_before(case):
    for (old, old_name, _), (new, new_name, decode) in zip(case.before, case.after, strict=True):
        for text in [*CORPUS, "\n".join(CORPUS)]:
            assert [new_name(i) for i in new(text)] == [old_name(i) for i in old(text)]
            assert decode(new(text)) == text
    note = next(n for n in case.out.notes if n.startswith("checked on"))
    assert note == "checked on 5 lines of the corpus: 5 are cut as before"
    assert case.out.warnings == ()


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(max_size=20), st.lists(st.sampled_from(CORPUS + WORDS), max_size=3).map(" ".join)))
def test_every_text_comes_back(case, text):
    if "\0" in text or "▁" in text:
        return
    for (old, _, decode_old), (new, _, decode_new) in zip(case.before, case.after, strict=True):
        assert decode_new(new(text)) == decode_old(old(text))


def test_rows_follow_the_ids(case):
    assert case.out.history[-1]["tokens"] < case.n - 40
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = case.ckpt.tensors[name].load(), case.out.tensors[name].load()
        assert new.shape[0] == case.out.config["vocab_size"] == case.out.history[-1]["tokens"]
        for (encode_old, _, _), (encode_new, _, _) in zip(case.before, case.after, strict=True):
            for text in CORPUS:
                assert new[encode_new(text)].equal(old[encode_old(text)])


def test_configs_and_asked_ids_are_kept(case):
    names = case.before[-1][1], case.after[-1][1]
    n_new = case.out.config["vocab_size"]
    generation = json.loads(case.out.files["generation_config.json"].read())
    pairs = [
        (case.n - 2, case.out.config["eos_token_id"]), (case.n - 1, generation["eos_token_id"][1]),
        (7, generation["suppress_tokens"][0]), (300, generation["suppress_tokens"][1]),
    ]  # fmt: skip
    for old, new in pairs:
        assert new < n_new
        assert names[0](old) == names[1](new)
    kept = {names[1](i) for i in range(n_new)}
    assert names[0](case.n - 3) in kept
    specials = (
        ["<|end|>", "<|user|>", "[extra]"]
        if case.kind == "byte_level"
        else ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    )
    assert kept.issuperset(specials)


def test_the_folder_is_whole(case, tmp_path):
    llmkit.save(case.out, tmp_path / "out")
    opened = llmkit.open_checkpoint(tmp_path / "out")
    assert llmkit.plan(opened, tmp_path / "again").warnings == ()


def test_rare_tokens_can_go(tmp_path, case):
    (tmp_path / "c.txt").write_text("\n".join(["the quick brown fox"] * 5 + ["she sells sea shells"]))
    all_of_it = vocab.trim(case.ckpt, tmp_path / "c.txt")
    frequent = vocab.trim(case.ckpt, tmp_path / "c.txt", min_count=5, pad_to_multiple=32)
    assert frequent.history[-1]["tokens"] < all_of_it.history[-1]["tokens"]
    assert frequent.config["vocab_size"] % 32 == 0
    encode, _, decode = case.encoders(frequent)[0]
    assert decode(encode("she sells sea shells")) == "she sells sea shells"


def test_the_pass_over_the_corpus_is_told(tmp_path, case):
    text = "the quick fox\n\njumps\n" * 9000
    (tmp_path / "c.txt").write_text(text)
    told = []
    vocab.trim(case.ckpt, tmp_path / "c.txt", on_progress=lambda *at: told.append(at))
    n_files = sum(name in case.ckpt.files for name in ("tokenizer.model", "tokenizer.json"))
    total = 2 * n_files * (len(text) + 1)  # each file by lines and in long chunks
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert 3 < len(told) < 30
    told = []
    vocab.info(case.ckpt, text=tmp_path / "c.txt", on_progress=lambda *at: told.append(at))
    assert (told[0], told[-1]) == ((0, len(text) + 1), (len(text) + 1, len(text) + 1))


def test_what_cannot_be_is_refused(tmp_path, case):
    with pytest.raises(InputError, match="cannot read"):
        vocab.trim(case.ckpt, tmp_path / "absent.txt")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match="is not UTF-8 text: invalid start byte at byte 3"):
        vocab.trim(case.ckpt, tmp_path / "bad.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="has no text"):
        vocab.trim(case.ckpt, tmp_path / "empty.txt")
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(InputError, match="id 99999 is no token"):
        vocab.trim(case.ckpt, tmp_path / "c.txt", keep_ids=[99999])


def test_a_trimmed_model_gives_the_same_logits_on_kept_tokens(case):
    import torch

    ids_old, ids_new = case.before[-1][0](CORPUS[0]), case.after[-1][0](CORPUS[0])
    old = llmkit.load_decoder(case.ckpt)(torch.tensor([ids_old]))
    new = llmkit.load_decoder(case.out)(torch.tensor([ids_new]))
    assert torch.allclose(new[0, :, ids_new], old[0, :, ids_old], atol=1e-5)


def test_the_real_vocabulary(shared, tmp_path):
    ckpt = world.model(
        tmp_path / "m", 32000, {"tokenizer.model": (shared / "tokenizers" / "llama.model").read_bytes()}, hidden=8
    )
    text = (shared / "data" / "wikitext" / "wikitext-2-raw-validation.txt").read_text()[:200_000]
    (tmp_path / "c.txt").write_text(text)
    out = vocab.trim(ckpt, tmp_path / "c.txt")
    figures = out.history[-1]
    old = SentencePieceProcessor(model_file=str(shared / "tokenizers" / "llama.model"))
    new = SentencePieceProcessor(model_proto=out.files["tokenizer.model"].read())
    for line in text.split("\n"):
        assert new.encode(line, out_type=str) == old.encode(line, out_type=str)
    assert figures["of_corpus"] == len(set(old.encode(text)) | {i for s in text.split("\n") for i in old.encode(s)})
    assert figures["tokens"] == new.vocab_size() < 8000


def test_vocab_json_with_merges_is_what_transformers_makes_of_it(tmp_path):
    """Folders of slow classes have no tokenizer.json (facebook/opt-125m, Qwen2Tokenizer of transformers 4)."""
    from transformers import AutoTokenizer

    whole = Tokenizer.from_str(world.byte_level(world.ENGLISH, 400))
    whole.model.save(str(tmp_path))
    n = whole.get_vocab_size()
    end = {"content": "<|endoftext|>", "special": True}
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
                "bos_token": "<|endoftext|>", "added_tokens_decoder": {str(n): end}}  # fmt: skip
    files = {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    files["tokenizer_config.json"] = json.dumps(settings)
    ckpt = world.model(tmp_path / "m", n + 1, files, hidden=16)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "m"))
    assert vocab.info(ckpt)["n_tokens"] == n + 1
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    out = vocab.trim(ckpt, tmp_path / "corpus.txt")
    llmkit.save(out, tmp_path / "out")
    ours = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert len(ours) < len(theirs)
    for text in [*CORPUS, "a<|endoftext|>fox"]:
        assert ours.convert_ids_to_tokens(ours(text).input_ids) == theirs.convert_ids_to_tokens(theirs(text).input_ids)
    metadata, warnings = vocabulary_metadata("m", ckpt.files, ckpt.config, n + 1, pre="gpt-2")
    assert warnings == []
    assert metadata["tokenizer.ggml.tokens"] == theirs.convert_ids_to_tokens(range(n + 1))


def test_an_id_below_zero_in_a_config_names_no_token():
    generation = FileContent.of_json({"eos_token_id": [2, -1], "pad_token_id": -1})
    config = {"pad_token_id": -1, "bos_token_id": 1, "image_token_index": 5, "text_config": {"eos_token_id": 7}}
    ckpt = Checkpoint("m", {}, config, {"generation_config.json": generation})
    assert mentioned_ids(ckpt) == [1, 2, 5, 7]
    (files,) = renumbered_generation(ckpt.files, {1: 0, 2: 1}).values()
    assert json.loads(files.read()) == {"eos_token_id": [1, -1], "pad_token_id": -1}
