"""Prompt formats against the text that the tuned models were trained on (published in their repositories)."""

from __future__ import annotations

import pytest

from llmkit.architecture.prompts import FORMATS, ChatTemplate, Message, Raw, choose_prompt
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
