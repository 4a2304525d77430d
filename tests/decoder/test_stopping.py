"""Streamed text against the whole text cut at its first stop text."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from llmkit.architecture.prompts import FORMATS
from llmkit.decoder.stopping import TextStream


def decode(ids):
    return bytes(ids).decode("utf-8", "replace")


def cut(text, stops):
    return text[: min([text.find(s) for s in stops if s in text], default=len(text))]


@given(
    text=st.text(alphabet="ab#\n人🙂", max_size=30), stops=st.lists(st.sampled_from(["##", "\n\n", "ab人", "#a", ""]))
)
def test_what_is_streamed_is_the_text_up_to_the_first_stop(text, stops):
    stream = TextStream(decode, stops)
    given_out = ""
    for token in text.encode():
        given_out += stream.push(token)
        assert cut(text, [s for s in stops if s]).startswith(given_out)
        if stream.is_stopped:
            break
    assert stream.is_stopped == any(s and s in text for s in stops)
    given_out += stream.rest()
    assert given_out == stream.text == cut(text, [s for s in stops if s])
    assert stream.rest() == ""


@given(text=st.text(alphabet="a ,!:;?中文[]训练时间\n", max_size=25))
def test_a_finished_text_streams_as_it_ends(text):
    finish = FORMATS["chatglm"].finish
    stream = TextStream(decode, finish=finish)
    given_out = "".join(stream.push(token) for token in text.encode())
    assert reference(text).startswith(given_out)
    assert given_out + stream.rest() == reference(text) == stream.text


def reference(answer):
    """ChatGLM-6B's process_response, told again."""
    answer = answer.strip().replace("[[训练时间]]", "2023年")
    for half, wide in (",，", "!！", ":：", ";；", "?？"):
        answer = re.sub(f"(?<=[\u4e00-\u9fff])[{half}]", wide, answer)
        answer = re.sub(f"[{half}](?=[\u4e00-\u9fff])", wide, answer)
    return answer


def test_answers_of_chatglm_as_its_code_shows_them():
    # figures: process_response of modeling_chatglm.py
    assert FORMATS["chatglm"].finish.apply(" 你好,我是a,b。今年是[[训练时间]]!\n") == "你好，我是a,b。今年是2023年！"
    assert FORMATS["chatglm2"].finish.apply(" 你好,a [[训练时间]] ") == "你好,a 2023年"
    assert FORMATS["vicuna"].finish.apply(" a ") == " a "


def test_only_what_may_begin_a_stop_text_is_held_back():
    stream = TextStream(decode, ["###"])
    assert [stream.push(t) for t in b"a#b##c"] == ["a", "", "#b", "", "", "##c"]
    assert stream.ids == list(b"a#b##c")
