"""Streamed text against the whole text cut at its first stop text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

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


def test_only_what_may_begin_a_stop_text_is_held_back():
    stream = TextStream(decode, ["###"])
    assert [stream.push(t) for t in b"a#b##c"] == ["a", "", "#b", "", "", "##c"]
    assert stream.ids == list(b"a#b##c")
