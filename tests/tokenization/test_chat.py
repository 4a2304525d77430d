"""Prompts in tokens: against transformers where it has the tokens, against the pieces' own ids elsewhere."""

from __future__ import annotations

import pytest

from llmkit.architecture.prompts import FORMATS, ChatTemplate, Message, Raw, Token
from llmkit.architecture.tokenizers import published_tokenizers
from llmkit.errors import InputError
from llmkit.tokenization.chat import (
    encode_chat,
    encode_marked,
    encode_pieces,
    ending_of,
    is_marked,
    marked_text,
    token_id,
    token_names,
)
from llmkit.tokenization.published import build_tokenizer

ASK = [Message("user", "the fox")]
TALK = [*ASK, Message("assistant", "over"), Message("user", "a</s>b")]


@pytest.fixture(scope="module")
def model(world):
    return world.sp_model(world.ENGLISH + world.CHINESE, 480)


@pytest.fixture(scope="module")
def sp(model):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model)


def published(name, model, **config):
    kind = published_tokenizers()[name]
    return build_tokenizer(kind, {kind.file: model}, config, {}, "m")


@pytest.fixture(scope="module")
def glm(model):
    return published("glm-sentencepiece", model)


@pytest.fixture(scope="module")
def llama(world, model, tmp_path_factory):
    """transformers' own tokenizer over the same pieces, which puts <s> in front."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer.from_str(world.fast_of(model))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_formats_of_text_equal_the_whole_text_in_transformers(llama):
    for name in ("vicuna", "llama-2-chat", "koala", "alpaca", "vicuna-v0", "belle", "openbuddy"):
        whole = FORMATS[name].render("the fox") if name == "alpaca" else FORMATS[name].render(ASK)
        assert encode_chat(llama, FORMATS[name], ASK) == llama(whole)["input_ids"], name
    talk = [*ASK, Message("assistant", "over"), Message("user", "the fox")]
    for name in ("vicuna", "llama-2-chat", "koala"):
        assert encode_chat(llama, FORMATS[name], talk) == llama(FORMATS[name].render(talk))["input_ids"], name


def test_a_question_cannot_spell_a_special_token(llama):
    ids = encode_chat(llama, FORMATS["vicuna"], TALK)
    assert ids.count(2) == 1  # the one after the answer of the history
    assert llama(FORMATS["vicuna"].render(TALK))["input_ids"].count(2) == 2
    assert llama.decode(ids, skip_special_tokens=False).count("</s>") == 2


def test_chatglm3_is_built_of_ids(glm, sp):
    n = sp.get_piece_size()
    user, assistant, system, line = n + 6, n + 7, n + 5, sp.encode("\n")
    expected = [n + 1, n + 3, system, *line, *sp.encode("in short"), user, *line, *sp.encode("the fox"), assistant]
    expected += [*line, *sp.encode("over"), user, *line, *sp.encode("a</s>b"), assistant]
    assert encode_chat(glm, FORMATS["chatglm3"], [Message("system", "in short"), *TALK]) == expected
    assert ending_of(glm, FORMATS["chatglm3"]).ids == (user, n + 8, 2)


def test_baichuan_is_built_of_fixed_ids(model, sp):
    tokenizer = published("baichuan", model, add_bos_token=False)
    ids = encode_chat(tokenizer, FORMATS["baichuan2-chat"], [Message("system", "in short"), *TALK])
    assert ids == [
        *sp.encode("in short"), 195, *sp.encode("the fox"), 196, *sp.encode("over"), 195, *sp.encode("a</s>b"), 196
    ]  # fmt: skip
    first = encode_chat(tokenizer, FORMATS["baichuan-chat"], TALK)
    assert first == [195, *sp.encode("the fox"), 196, *sp.encode("over"), 2, 195, *sp.encode("a</s>b"), 196]


def test_chatglm_closes_its_question_with_the_tokenizers_tokens(world):
    kind = published_tokenizers()["ice-text"]
    names = list(kind.reserved)
    data = world.sp_model(
        world.CHINESE, 600, control_symbols=names, user_defined_symbols=["<n>", *kind.appended], pad_id=3,
        pad_piece="<pad>",
    )  # fmt: skip
    tokenizer = build_tokenizer(kind, {kind.file: data}, {"num_image_tokens": 0}, {}, "m")
    ids = encode_chat(tokenizer, FORMATS["chatglm"], [Message("user", "人工"), Message("assistant", "智能"), *ASK])
    text = "[Round 0]\n问：人工\n答：智能\n[Round 1]\n问：the fox\n答："
    assert ids == tokenizer(text)["input_ids"]
    assert token_names(tokenizer, ids[-2:]) == ["[gMASK]", "<sop>"]


def test_templates_are_read_with_their_special_tokens(llama):
    llama.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    assert encode_chat(llama, ChatTemplate(), ASK) == llama("[user]the fox</s>", add_special_tokens=False)["input_ids"]
    llama.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(InputError, match="the chat template refuses this conversation: only users"):
        encode_chat(llama, ChatTemplate(), ASK)
    llama.chat_template = None


def test_tokens_are_looked_up_by_name_or_id(llama, glm):
    assert token_id(llama, Token("</s>")) == 2
    assert token_id(llama, Token("<|user|>")) is None
    assert token_id(llama, Token("<reserved_106>", 195)) == 195
    assert token_id(llama, Token("<reserved_106>", 10**6)) is None
    assert ending_of(llama, FORMATS["chatglm3"]).ids == (2,)
    assert ending_of(llama, FORMATS["vicuna-v0"]).texts == ("###",)
    with pytest.raises(InputError) as caught:
        encode_chat(llama, FORMATS["stablelm-tuned"], ASK)
    assert caught.value.message == ("the prompt format is made of the token <|SYSTEM|>, which this tokenizer has not")
    assert "--chat-template raw" in caught.value.hint


@pytest.mark.parametrize("name", ["vicuna", "llama-2-chat", "chatglm3", "chatglm2", "baichuan-chat", "belle"])
def test_a_marked_text_has_the_ids_of_its_pieces(glm, name):
    for messages in (ASK, TALK):
        if name == "llama-2-chat" and messages is TALK:
            messages = [*ASK, Message("assistant", "over"), Message("user", "again")]
        pieces = FORMATS[name].pieces(messages)
        text = marked_text(glm, pieces)
        assert is_marked(text)
        assert encode_marked(glm, text) == encode_pieces(glm, pieces)
        # a continuation is encoded with the text that it goes on with
        more = encode_marked(glm, text + " the", add_special_tokens=False)
        last = pieces[-1] if isinstance(pieces[-1], str) else ""
        assert (
            more[-len(glm(last + " the", add_special_tokens=False)["input_ids"]) :]
            == (glm(last + " the", add_special_tokens=False)["input_ids"])
        )


def test_marks_in_a_text_are_refused(glm):
    assert marked_text(glm, ["a", "b"]) == "a\ufdd2b"
    assert encode_marked(glm, marked_text(glm, ["a", "b"]), add_special_tokens=False) == [
        *glm("a", add_special_tokens=False)["input_ids"], *glm("b", add_special_tokens=False)["input_ids"]
    ]  # fmt: skip
    assert marked_text(glm, Raw().pieces(ASK)) == "\ufdd2the fox"
    with pytest.raises(InputError, match="U\\+FDD0"):
        marked_text(glm, ["a\ufdd0" + "5\ufdd1"])


@pytest.mark.shared
def test_llama_2_on_llamas_model(shared):
    """As Meta's chat_completion encodes: every round on its own, with <s> and </s>."""
    from sentencepiece import SentencePieceProcessor

    data = (shared / "tokenizers" / "llama.model").read_bytes()
    tokenizer, sp = published("llama", data), SentencePieceProcessor(model_proto=data)
    talk = [Message("system", "Be brief."), Message("user", "One?"), Message("assistant", "1."), Message("user", "2?")]
    assert encode_chat(tokenizer, FORMATS["llama-2-chat"], talk) == [
        1, *sp.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOne? [/INST] 1. "), 2, 1, *sp.encode("[INST] 2? [/INST]")
    ]  # fmt: skip
