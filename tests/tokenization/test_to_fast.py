"""tokenizer.json of published tokenizers: transformers' ids equal those of the published file's own library."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.architecture.prompts import FORMATS, Message
from llmkit.architecture.tokenizers import published_tokenizers
from llmkit.checkpoint.file_content import FileContent
from llmkit.tokenization.chat import encode_chat
from llmkit.tokenization.published import build_tokenizer
from llmkit.tokenization.to_fast import can_be_fast, fast_files

REMOTE = {"auto_map": {"AutoTokenizer": ["tokenization.SomeTokenizer", None]}, "add_bos_token": False}
texts = st.text(
    alphabet=st.one_of(
        st.sampled_from("the fox 人工\n 19"), st.characters(codec="utf-8", exclude_characters="\u2581\x00")
    ),
    max_size=40,
)


def both(folder, kind, data, **extra):
    """(made from the file, transformers' from the folder that is written)."""
    from transformers import AutoTokenizer

    config = REMOTE | {"tokenizer_class": kind.classes[0]} | extra
    made = fast_files(kind, {kind.file: FileContent(data=data)}, config, {}, "m")
    for name, content in made.items():
        (folder / name).write_bytes(content.read())
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return build_tokenizer(kind, {kind.file: data}, config, {}, "m"), theirs


@pytest.fixture(scope="module")
def glm(world, tmp_path_factory):
    return both(
        tmp_path_factory.mktemp("glm"),
        published_tokenizers()["glm-sentencepiece"],
        world.sp_model(world.ENGLISH + world.CHINESE, 480),
    )


@pytest.fixture(scope="module")
def glm4(world, tmp_path_factory):
    from llmkit.tokenization.byte_level import to_bytes

    ranks = {bytes([b]): b for b in range(256)}
    for merge in json.loads(world.byte_level(world.ENGLISH + world.CHINESE, 420))["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        ranks.setdefault(to_bytes(left) + to_bytes(right), len(ranks))
    data = b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items())
    return both(tmp_path_factory.mktemp("glm4"), published_tokenizers()["glm-tiktoken"], data)


@settings(max_examples=120)
@given(text=texts)
def test_the_ids_are_the_same(glm, glm4, text):
    for ours, theirs in (glm, glm4):
        ids = ours(text)["input_ids"]
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_and_padding(glm, glm4):
    for ours, theirs in (glm, glm4):
        assert len(theirs) == len(ours)
        for name in ("eos_token_id", "pad_token_id", "bos_token_id", "padding_side"):
            assert getattr(theirs, name) == getattr(ours, name), name
        assert theirs.convert_tokens_to_ids("<|user|>") == ours.convert_tokens_to_ids("<|user|>")
        batch = ["the", "the quick brown fox"]
        assert theirs(batch, padding=True)["input_ids"] == ours(batch, padding=True)["input_ids"]
        talk = [Message("user", "the</s> fox"), Message("assistant", "over"), Message("user", "人工")]
        assert encode_chat(theirs, FORMATS["chatglm3"], talk) == encode_chat(ours, FORMATS["chatglm3"], talk)


def test_bos_as_the_settings_say(world, tmp_path):
    data = world.sp_model(world.ENGLISH, 420)
    for add in (True, False):
        (tmp_path / str(add)).mkdir()
        ours, theirs = both(tmp_path / str(add), published_tokenizers()["baichuan"], data, add_bos_token=add)
        assert theirs("the fox")["input_ids"] == ours("the fox")["input_ids"]
        assert (ours("the fox")["input_ids"][0] == 1) == add


def test_a_model_that_normalises_and_trims(world, tmp_path):
    """Unigram with nmt_nfkc, as SentencePiece trains by default."""
    data = world.sp_model(
        world.ENGLISH + world.CHINESE, 420, model_type="unigram", normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    )  # fmt: skip
    ours, theirs = both(tmp_path, published_tokenizers()["baichuan"], data)
    for text in ("the  quick ﬁfth fox ", "  人工，智能！ ①", "ｆｕｌｌ width", "a\tb"):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text


def test_what_tokenizer_json_cannot_say():
    assert [n for n, kind in published_tokenizers().items() if not can_be_fast(kind)] == ["ice-text", "rwkv-world"]


@pytest.mark.shared
def test_llamas_model(shared, tmp_path):
    data = (shared / "tokenizers" / "llama.model").read_bytes()
    ours, theirs = both(tmp_path, published_tokenizers()["glm-sentencepiece"], data)
    lines = (next((shared / "data" / "wikitext").iterdir())).read_text(encoding="utf-8").splitlines()[:300]
    assert [theirs(x, split_special_tokens=True)["input_ids"] for x in lines] == [ours(x)["input_ids"] for x in lines]
