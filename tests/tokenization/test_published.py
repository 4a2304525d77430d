"""Tokenizers from their published files: ids by the sentencepiece library, tiktoken's rule written out, arithmetic.

The files of the real releases are not here. LLaMA's model and the Chinese one of `shared` stand in for them; the ids
recorded for those were made by the code that the releases carry, run beside the project on the same stand-ins.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from llmkit.architecture.prompts import ChatTemplate, Message
from llmkit.architecture.tokenizers import ByteTrieFile, published_tokenizers
from llmkit.errors import InputError
from llmkit.tokenization.chat import encode_chat
from llmkit.tokenization.published import build_tokenizer, choose_kind, named_classes
from llmkit.tokenization.templates import render
from tests.registered import install

KINDS = published_tokenizers()
ICE, GLM, RANKS, BAICHUAN = (KINDS[n] for n in ("ice-text", "glm-sentencepiece", "glm-tiktoken", "baichuan"))
TEXT = "the quick  fox\n人工智能\t在 1970"
BLANKS = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
texts = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=40)


def processor(data):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=data)


def made(kind, data, settings=(), config=()):
    return build_tokenizer(kind, {kind.file: data}, dict(settings), dict(config), "m")


@pytest.fixture(scope="module")
def plain(world):
    return world.sp_model(world.ENGLISH + world.CHINESE, 480)


@pytest.fixture(scope="module")
def glm(plain):
    return made(GLM, plain)


@pytest.fixture(scope="module")
def baichuan(plain):
    return made(BAICHUAN, plain, {"add_bos_token": False, "pad_token": {"content": "<unk>"}})


@pytest.fixture(scope="module")
def whole_ice(world):
    """A file that holds the special tokens and the blanks already, as the second release's does."""
    return world.sp_model(
        world.ENGLISH + world.CHINESE, 640, control_symbols=SPECIALS, user_defined_symbols=["<n>", *BLANKS],
        pad_id=3, pad_piece="<pad>",
    )  # fmt: skip


# --- SentencePiece with appended tokens ---


def test_appended_tokens_follow_the_file(glm, plain):
    sp = processor(plain)
    n = sp.get_piece_size()
    assert glm(TEXT)["input_ids"] == [n + 1, n + 3, *sp.encode(TEXT)]
    assert glm(TEXT, add_special_tokens=False)["input_ids"] == sp.encode(TEXT)
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert glm.convert_tokens_to_ids(names) == list(range(n, n + 9))
    assert glm.convert_ids_to_tokens([n + 6, 1, 300]) == ["<|user|>", "<s>", sp.id_to_piece(300)]
    assert (glm.bos_token_id, glm.eos_token_id, glm.pad_token_id, glm.unk_token_id) == (1, 2, 0, 0)
    assert len(glm) == n + 9
    assert glm.convert_tokens_to_ids(sp.id_to_piece(400)) == 400


def test_special_tokens_are_text_unless_asked_for(glm, plain):
    sp = processor(plain)
    n = sp.get_piece_size()
    spelt = "the<|user|>sop</s>"
    assert glm(spelt, add_special_tokens=False)["input_ids"] == sp.encode(spelt)
    parsed = glm(spelt, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert parsed == [*sp.encode("the"), n + 6, n + 3, 2]
    assert glm.decode(parsed) == spelt
    assert glm.decode(parsed, skip_special_tokens=True) == "the"
    assert glm.decode([n + 200, 5], skip_special_tokens=True) == processor(plain).decode([5])


def test_a_batch_is_padded_on_the_left(glm):
    rows = [glm(t)["input_ids"] for t in ("the", "the quick brown fox")]
    batch = glm(["the", "the quick brown fox"], padding=True)
    n = len(rows[1]) - len(rows[0])
    assert batch["input_ids"] == [[0] * n + rows[0], rows[1]]
    assert batch["attention_mask"] == [[0] * n + [1] * len(rows[0]), [1] * len(rows[1])]
    assert glm(["the"], return_attention_mask=False) == {"input_ids": [rows[0]]}
    tensors = glm(["the", "the quick brown fox"], padding=True, return_tensors="pt")
    assert tensors["input_ids"].tolist() == batch["input_ids"]


@settings(max_examples=150)
@given(text=texts)
def test_every_text_comes_back(glm, baichuan, text):
    for tokenizer in (glm, baichuan):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_bos_and_eos_as_the_settings_say(plain, baichuan):
    ids = processor(plain).encode(TEXT)
    assert baichuan(TEXT)["input_ids"] == ids
    assert baichuan.pad_token_id == 0
    assert baichuan.model_max_length > 10**18
    assert made(BAICHUAN, plain, {"model_max_length": 4096.0, "chat_template": 5}).model_max_length == 4096
    assert made(BAICHUAN, plain)(TEXT)["input_ids"] == [1, *ids]
    assert made(BAICHUAN, plain, {"add_eos_token": True})(TEXT)["input_ids"] == [1, *ids, 2]


def test_reserved_tokens_of_the_file_are_never_parsed_out_of_text(world):
    names = [f"<reserved_{n}>" for n in (102, 103)]
    data = world.sp_model(world.ENGLISH, 420, user_defined_symbols=names)
    sp = processor(data)
    assert sp.piece_to_id(names[0]) in sp.encode("a<reserved_102>b")  # the file alone would
    tokenizer = made(BAICHUAN, data, {"add_bos_token": False})
    ids = tokenizer("a<reserved_102>b")["input_ids"]
    assert sp.piece_to_id(names[0]) not in ids
    assert tokenizer.decode(ids) == "a<reserved_102>b"
    assert tokenizer.convert_tokens_to_ids(names) == [sp.piece_to_id(t) for t in names]
    assert tokenizer("the fox")["input_ids"] == sp.encode("the fox")


def test_added_tokens_follow_their_files(plain):
    """[PAD] of 2023's fine-tunes, and words that were added to the vocabulary, which are text."""
    sp = processor(plain)
    n = sp.get_piece_size()
    llama = KINDS["llama"]
    added = json.dumps({"[PAD]": n, "robot": n + 1}).encode()
    tokenizer = build_tokenizer(
        llama, {llama.file: plain, "added_tokens.json": added}, {"pad_token": "[PAD]", "bos_token": ""}, {}, "m"
    )
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, len(tokenizer)) == (n, None, n + 2)
    ids = tokenizer("the robot[PAD]")["input_ids"]
    assert ids == [*sp.encode("the "), n + 1, *sp.encode("[PAD]")]
    assert tokenizer.decode([*sp.encode("the "), n + 1, n], skip_special_tokens=True) == "the robot"
    later = {"added_tokens_decoder": {str(n): {"content": "<|im|>", "special": True}, "1": {"content": "<s>"}}}
    assert made(llama, plain, later)("a<|im|>", split_special_tokens=False)["input_ids"] == [1, *sp.encode("a"), n]
    with pytest.raises(InputError, match=r"m: added_tokens.json is not valid JSON"):
        build_tokenizer(llama, {llama.file: plain, "added_tokens.json": b"{"}, {}, {}, "m")


# --- ice_text.model ---


def spelt(text):
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for n in range(80, 1, -1):
        text = text.replace(" " * n, f"<|blank_{n}|>")
    return text


@pytest.mark.parametrize("offset", [0, 20000])
def test_ice_text_that_holds_its_special_tokens(whole_ice, offset):
    sp = processor(whole_ice)
    tokenizer = made(ICE, whole_ice, {"num_image_tokens": offset, "eos_token": "<eop>"})
    text = f"{TEXT} a{' ' * 83}b{' ' * 161}c"
    ids = [i + offset for i in sp.encode(spelt(text))]
    gmask, sop, eop = (sp.piece_to_id(t) + offset for t in ("[gMASK]", "<sop>", "<eop>"))
    assert tokenizer(text)["input_ids"] == [*ids, gmask, sop]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (sop, eop, 3 + offset)
    assert tokenizer.decode([*ids, gmask, sop, *ids, eop], skip_special_tokens=True) == text + text
    assert tokenizer.decode([gmask, 10**6]) == "[gMASK]"
    assert not offset or tokenizer.decode([7]) == ""  # an image's
    assert len(tokenizer) == sp.get_piece_size() + offset


def test_ice_text_of_the_first_release_lacks_them(plain):
    n = processor(plain).get_piece_size()
    tokenizer = made(ICE, plain, {"pad_token": None}, {"gmask_token_id": n + 1 + 20000, "bos_token_id": n + 4 + 20000})
    ids = tokenizer(f"x{' ' * 83}y\t[gMASK]")["input_ids"]
    blank, tab = n + 20000 + len(SPECIALS) + 79, n + 20000 + len(SPECIALS)
    assert blank in ids
    assert tab in ids
    assert ids[-2:] == [n + 20001, n + 20004]
    assert n + 20001 not in ids[:-2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"x{' ' * 83}y\t[gMASK]"


def test_ids_that_config_json_contradicts(whole_ice):
    gmask = processor(whole_ice).piece_to_id("[gMASK]")
    with pytest.raises(InputError) as caught:
        made(ICE, whole_ice, {"num_image_tokens": 20000}, {"gmask_token_id": gmask})
    assert caught.value.message == (
        f"m: ice_text.model: [gMASK] has the id {gmask + 20000}, but config.json says gmask_token_id {gmask}"
    )
    assert "num_image_tokens 20000" in caught.value.hint


# By the code of ChatGLM-6B's first release (tokenization_chatglm.py) on the Chinese model, without [gMASK] <sop>.
RECORDED = {
    "Hello, 你好！\n\n\tdef f(x):\n        return x  # 三": [
        22380, 21930, 23225, 20003, 31822, 25271, 20654, 20216, 20654, 20064, 40008, 23441, 21094, 24499, 20014, 20913,
        20017, 23005, 20654, 20064, 40015, 21660, 20865, 22682, 20654, 20004, 20913, 40009, 24990, 23807],
    "[gMASK]<sop></s> 价格是 12,345 元 🙂": [
        22678, 20863, 25736, 20363, 20620, 20994, 20271, 20208, 24578, 20216, 20137, 20208, 20064, 20004, 20573, 20011,
        24956, 20003, 20046, 21990, 20004, 20122, 20004, 40328, 40247, 40241, 40218],
    " 前导空格": [20004, 20091, 21434, 20397, 20511],
}  # fmt: skip


@pytest.mark.shared
def test_the_published_code_on_a_stand_in(shared):
    data = (shared / "tokenizers" / "chinese_sp.model").read_bytes()
    tokenizer = made(ICE, data, {"pad_token": None}, {"gmask_token_id": 40001})
    for text, ids in RECORDED.items():
        assert tokenizer(text)["input_ids"] == [*ids, 40001, 40004]
    assert tokenizer.decode(RECORDED[" 前导空格"]) == "前导空格"
    assert len(tokenizer) == 40344


@pytest.mark.shared
def test_llamas_model_with_appended_tokens(shared):
    data = (shared / "tokenizers" / "llama.model").read_bytes()
    assert made(GLM, data)("Hello 你好\n")["input_ids"] == [32001, 32003, 15043, 29871, 30919, 31076, 13]


# --- tiktoken ranks ---


def ranks_of(world):
    """Ranks as training yields them: bytes, then merges in their order."""
    from llmkit.tokenization.byte_level import to_bytes

    document = json.loads(world.byte_level(world.ENGLISH + world.CHINESE, 420))
    ranks = {bytes([b]): b for b in range(256)}
    for merge in document["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        ranks.setdefault(to_bytes(left) + to_bytes(right), len(ranks))
    return ranks


def by_rank(ranks, text, pattern=RANKS.pattern):
    """tiktoken's rule: words by the pattern; in a word the pair of least rank first, the leftmost of equals."""
    import regex

    ids = []
    for word in regex.findall(pattern, text):
        parts = [bytes([b]) for b in word.encode()]
        while len(parts) > 1:
            found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not found:
                break
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[p] for p in parts]
    return ids


@pytest.fixture(scope="module")
def glm4(world):
    ranks = ranks_of(world)
    data = b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items())
    return made(RANKS, data), ranks


@settings(max_examples=150)
@given(
    text=st.text(alphabet=st.one_of(st.sampled_from("the fox 人工\n 19"), st.characters(codec="utf-8")), max_size=40)
)
def test_ranks_by_their_rule(glm4, text):
    tokenizer, ranks = glm4
    ids = tokenizer(text)["input_ids"]
    assert ids == [len(ranks) + 2, len(ranks) + 4, *by_rank(ranks, text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_ranks_and_their_special_tokens(glm4):
    tokenizer, ranks = glm4
    n = len(ranks)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<sop>", "<|user|>", "<|observation|>"]) == [
        n, n + 4, n + 7, n + 9
    ]  # fmt: skip
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (n, n, None)
    assert tokenizer("<|user|>", add_special_tokens=False)["input_ids"] == by_rank(ranks, "<|user|>")


def test_qwens_ranks_are_of_composed_texts(world):
    kind, ranks = KINDS["qwen-tiktoken"], ranks_of(world)
    tokenizer = made(kind, b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    text = "Cafe\u0301 the fox\n\n 人工 1970 <|im_start|>"
    composed = unicodedata.normalize("NFC", text)
    assert tokenizer(text)["input_ids"] == by_rank(ranks, composed, kind.pattern)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == composed
    n = len(ranks)
    known = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
    assert tokenizer.convert_tokens_to_ids(known) == [n, n + 1, n + 2, n + 3, n + 207]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (n, n, None)


# --- the choice ---


def test_the_kind_follows_class_and_file(plain, glm4):
    ranks = b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in glm4[1].items())
    class_ = {"tokenizer_class": "ChatGLMTokenizer"}
    remote = {"auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}}
    assert named_classes(class_ | remote) == ("ChatGLMTokenizer", "BaichuanTokenizer")
    assert choose_kind(class_, {"ice_text.model": plain}) is ICE
    assert choose_kind(class_, {"tokenizer.model": plain}) is GLM
    assert choose_kind(class_, {"tokenizer.model": ranks}) is RANKS
    assert choose_kind(remote, {"tokenizer.model": plain}) is BAICHUAN
    assert choose_kind({"tokenizer_class": "LLaMATokenizer"}, {"tokenizer.model": plain}) is KINDS["llama"]
    assert choose_kind({"tokenizer_class": "T5Tokenizer"}, {"tokenizer.model": plain}) is None
    assert choose_kind({}, {"tokenizer.model": plain}) is None
    assert choose_kind({}, {"tokenizer.model": plain}, default=BAICHUAN) is BAICHUAN
    assert choose_kind(class_, {"tokenizer.model": plain}, default=BAICHUAN) is GLM
    assert choose_kind({"tokenizer_class": "T5Tokenizer"}, {"tokenizer.model": plain}, default=BAICHUAN) is None
    unknown = {"auto_map": {"AutoTokenizer": ["x.MyTokenizer", None]}}
    assert choose_kind(unknown, {"tokenizer.model": plain}, default=BAICHUAN) is BAICHUAN
    assert choose_kind({}, {"ice_text.model": plain}) is ICE
    assert isinstance(choose_kind({}, {"rwkv_vocab_v20230424.txt": b""}), ByteTrieFile)
    assert choose_kind(remote, {"ice_text.model": plain}) is None


def test_files_that_are_no_vocabulary(plain):
    with pytest.raises(InputError, match=r"m: tokenizer.model is truncated or no SentencePiece model"):
        made(GLM, plain[:500])
    with pytest.raises(InputError, match=r"m: tokenizer.model is empty"):
        made(GLM, b"")
    with pytest.raises(InputError, match=r"m: ice_text.model is truncated or no SentencePiece model"):
        made(ICE, b"\x00\x01nonsense")
    with pytest.raises(InputError, match=r"m: tokenizer.model, line 2: expected base64 and a rank"):
        made(RANKS, b"YQ== 0\nnonsense\n")


def test_chat_templates_spell_special_tokens(plain):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = made(GLM, plain, {"chat_template": [{"name": "default", "template": template}]})
    talk = [{"role": "user", "content": "the fox"}]
    assert render(tokenizer, talk) == "<|user|>the fox<|assistant|>"
    n = processor(plain).get_piece_size()
    ids = encode_chat(tokenizer, ChatTemplate(), [Message("user", "the fox")])
    assert ids == [n + 6, *processor(plain).encode("the fox"), n + 7]
    with pytest.raises(InputError, match="m has no chat template"):
        render(made(GLM, plain), talk)


BOX = """
from llmkit.architecture.tokenizers import SentencePieceFile

TOKENIZER = SentencePieceFile(file="tokenizer.model", classes=("BoxTokenizer",), specials=("<box>",), prefix=("<box>",))
"""


def test_a_tokenizer_of_another_distribution(plain, tmp_path, monkeypatch):
    settings, files = {"tokenizer_class": "BoxTokenizer"}, {"tokenizer.model": plain}
    assert choose_kind(settings, files) is None
    install(tmp_path / "box", monkeypatch, "llmkit.tokenizers", "box", "third_box_tokenizer:TOKENIZER", BOX)
    install(tmp_path / "torn", monkeypatch, "llmkit.tokenizers", "torn", "third_torn_tokenizer:TOKENIZER", "1 / 0\n")
    kind = choose_kind(settings, files)
    assert kind is published_tokenizers()["box"]
    theirs = SentencePieceProcessor(model_proto=plain)
    ours = build_tokenizer(kind, files, settings, {}, "box").encode("one box, two boxes")
    assert ours == [theirs.get_piece_size(), *theirs.encode("one box, two boxes")]
