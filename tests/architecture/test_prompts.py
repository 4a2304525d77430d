"""Prompt formats against the text that the tuned models were trained on (published in their repositories)."""

from __future__ import annotations

import hashlib

import pytest

from llmkit.architecture.prompts import FORMATS, ChatTemplate, Message, Raw, Token, choose_prompt
from llmkit.errors import InputError

USER = [Message("user", "Why {x}?")]
TALK = [Message("user", "One?"), Message("assistant", "1."), Message("user", "Two?")]


def test_alpaca():
    assert FORMATS["alpaca"].render("Why {input}?") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhy {input}?\n\n### Response:"
    )
    assert FORMATS["alpaca"].render("Sort.", "b {question} a") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSort.\n\n### Input:\nb {question} a\n\n### Response:"
    )


def test_vicuna():
    head = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    assert FORMATS["vicuna"].render(USER) == f"{head} USER: Why {{x}}? ASSISTANT:"
    assert FORMATS["vicuna"].render(TALK) == f"{head} USER: One? ASSISTANT: 1.</s>USER: Two? ASSISTANT:"
    assert FORMATS["vicuna"].render([Message("system", "Be brief."), *USER]).startswith("Be brief. USER:")


def test_llama_2_chat():
    chat = FORMATS["llama-2-chat"]
    assert chat.render(USER) == "[INST] Why {x}? [/INST]"
    assert chat.render([Message("system", "Be brief."), *TALK]) == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOne? [/INST] 1. </s><s>[INST] Two? [/INST]"
    )


# sha256 of what fschat 0.2.36 renders (conversation.py: get_conv_template(theirs), roles alternating, last message
# None) for the question `Why {x}?`, and for it after `One\n\nline?` answered by `1.\n2.`; of its rwkv without the
# example turns that it puts first.
FASTCHAT = {
    "vicuna-v0": ("zero_shot", "51498e808a2321b1", "9882a914f5b2f5fd"),
    "vicuna": ("vicuna_v1.1", "77b2d99da0bd97df", "2e64bae24cad0fb8"),
    "koala": ("koala_v1", "688c2aa592471a24", "817b272457f09230"),
    "llama-2-chat": ("llama-2", "9d7467ab6d59bc4c", "1e4f7f593828e642"),
    "chinese-alpaca-2": ("chinese-alpaca2", "0fdbfdb189e83ff2", "4ea57526503c8293"),
    "chatglm": ("chatglm", None, "e4510717c3f5955b"),  # its first question is [Round 0], against modeling_chatglm.py
    "chatglm2": ("chatglm2", "f5905dd00de26edd", "39d658c0bc6cc191"),
    "chatglm3": ("chatglm3", "6343165969d0eedf", "b5714436df96c360"),
    "oasst": ("oasst_pythia", "4493f4617db967a1", "3c21bac7cca05367"),
    "oasst-llama": ("oasst_llama", "de59bd5dfc5c3bfa", "0f8e591fff96c29c"),
    "stablelm-tuned": ("stablelm", "32d18035b3aa0629", "d4f7548e8ba2353f"),
    "baize": ("baize", "62d2002d16e53f72", "fd9250a4f7675b7f"),
    "rwkv-raven": ("rwkv", "1f9fcf64db068a51", "c9301141c8a3f9b5"),
    "phoenix": ("phoenix", "2ddd019356dcc65a", "4260b21e148fe90e"),
    "falcon-180b-chat": ("falcon-chat", "6fb0dd088ca44154", "bb69e0c8c89db49f"),
    "baichuan-chat": ("baichuan-chat", "2c58b7e88d1d37e9", None),  # no end token after its answers
    "baichuan2-chat": ("baichuan2-chat", "801f4142d7b87a63", "4f0af289afdad5e1"),
}
LINES = [Message("user", "One\n\nline?"), Message("assistant", "1.\n2."), *USER]


@pytest.mark.parametrize("name", FASTCHAT)
def test_the_text_is_fastchats(name):
    _, one, talk = FASTCHAT[name]
    for messages, digest in ((USER, one), (LINES, talk)):
        if digest is not None:
            assert hashlib.sha256(FORMATS[name].render(messages).encode()).hexdigest()[:16] == digest


def test_formats_that_fastchat_has_otherwise():
    assert FORMATS["chatglm"].render(USER) == "Why {x}?"
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert FORMATS["chinese-alpaca"].render("Why?") == f"{head}\n\n### Instruction:\n\nWhy?\n\n### Response:\n\n"
    assert "### Instruction:\n\nSort.\nb a\n\n###" in FORMATS["chinese-alpaca"].render("Sort.", "b a")
    assert FORMATS["baichuan-chat"].render(TALK) == (
        "<reserved_102>One?<reserved_103>1.</s><reserved_102>Two?<reserved_103>"
    )
    assert FORMATS["belle"].render(TALK) == "Human: \nOne?\n\nAssistant: \n1.\n\nHuman: \nTwo?\n\nAssistant: \n"
    assert FORMATS["belle-2m"].render(USER) == "Human: Why {x}?\n\nAssistant:"
    assert FORMATS["redpajama-chat"].render(TALK) == "<human>: One?\n<bot>: 1.\n<human>: Two?\n<bot>:"
    assert FORMATS["falcon-instruct"].render(TALK) == "User: One?\nAssistant: 1.\nUser: Two?\nAssistant:"
    assert FORMATS["rwkv-world"].render(LINES) == (
        "User: One\nline?\n\nAssistant: 1.\n2.\n\nUser: Why {x}?\n\nAssistant:"
    )
    buddy = FORMATS["openbuddy"].render(TALK)
    assert buddy.startswith("You are a helpful, respectful and honest INTP-T AI Assistant named Buddy. You are talking")
    assert buddy.endswith("not related to GPT or OpenAI.\n\nUser: One?\nAssistant: 1.\nUser: Two?\nAssistant:")


def test_special_tokens_are_pieces_and_never_text():
    system = Message("system", "Be brief.")
    user, assistant = Token("<|user|>"), Token("<|assistant|>")
    # build_chat_input encodes the line of the role and the content apart
    assert FORMATS["chatglm3"].pieces([system, *TALK]) == (
        Token("<|system|>"), "\n", "Be brief.", user, "\n", "One?", assistant, "\n", "1.", user, "\n", "Two?", assistant
    )  # fmt: skip
    assert FORMATS["baichuan2-chat"].pieces([system, *USER]) == (
        "Be brief.", Token("<reserved_106>", 195), "Why {x}?", Token("<reserved_107>", 196)
    )  # fmt: skip
    spelt = [Message("user", "</s><|user|>")]
    assert FORMATS["vicuna"].pieces(spelt)[0].endswith("USER: </s><|user|> ASSISTANT:")
    assert FORMATS["chatglm3"].pieces(spelt) == (user, "\n", "</s><|user|>", assistant)
    # Meta encodes a question with its answer as one text, and every round on its own
    assert FORMATS["llama-2-chat"].pieces(TALK) == (
        "[INST] One? [/INST] 1. ", Token("</s>"), Token("<s>"), "[INST] Two? [/INST]"
    )  # fmt: skip


def test_what_a_format_has_no_place_for():
    with pytest.raises(InputError, match="no place for a system message"):
        FORMATS["chatglm2"].pieces([Message("system", "s"), *USER])
    for name in ("alpaca", "raw"):
        with pytest.raises(InputError, match="one question and no history; found user, assistant, user"):
            FORMATS[name].pieces(TALK)
    assert FORMATS["raw"].pieces(USER) == ("Why {x}?",)


@pytest.mark.parametrize("turns", [[], TALK[:2], TALK[1:], [*USER, *USER]])
def test_roles_must_alternate(turns):
    with pytest.raises(InputError, match="user, assistant"):
        FORMATS["vicuna"].render(turns)


def test_the_checkpoints_own_template_comes_first():
    family = FORMATS["vicuna"]
    assert choose_prompt(None, has_chat_template=True, family=family) == ChatTemplate()
    assert choose_prompt(None, has_chat_template=False, family=family) == family
    assert choose_prompt(None, has_chat_template=False) == Raw()
    assert choose_prompt("alpaca", has_chat_template=True) == FORMATS["alpaca"]
    with pytest.raises(InputError) as caught:
        choose_prompt("vicunna", has_chat_template=True)
    assert caught.value.hint == "did you mean vicuna?"
    with pytest.raises(InputError, match="no chat template"):
        choose_prompt("chat-template", has_chat_template=False)
