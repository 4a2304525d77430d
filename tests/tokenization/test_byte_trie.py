"""Greedy byte vocabularies against the rule itself, tried out in full at every place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import InputError
from llmkit.tokenization.byte_trie import ByteTrie

# A file as ChatRWKV writes it: ids from 1, single bytes first, text as str and what is no text as bytes.
WORDS = ["ab", "abc", "abcd", "cd", "的", "人工", "人工智能", " the", "\n\n", "'", '"', "é"]
TOKENS = (
    [bytes([b]) for b in range(256)] + [w.encode() for w in WORDS if len(w.encode()) > 1] + [b"\xe4\xba", b"\xff\xfe"]
)
FILE = "".join(f"{i} {t.decode() if t.isascii() else t!r} {len(t)}\n" for i, t in enumerate(TOKENS, 1)
               if not t.isascii()) + "".join(
    f"{i} {t.decode()!r} {len(t)}\n" for i, t in enumerate(TOKENS, 1) if t.isascii())  # fmt: skip


@pytest.fixture(scope="module")
def trie():
    return ByteTrie.parse(FILE.encode(), "vocab.txt")


def longest_first(data: bytes) -> list[int]:
    ids, i = [], 0
    while i < len(data):
        token = max((t for t in TOKENS if data.startswith(t, i)), key=len)
        ids.append(TOKENS.index(token) + 1)
        i += len(token)
    return ids


@given(text=st.text(alphabet=st.one_of(st.sampled_from("abcd的人工智能 the\n'\"é"), st.characters(codec="utf-8"))))
def test_the_longest_token_wins_and_every_text_comes_back(trie, text):
    ids = trie.encode(text)
    assert ids == longest_first(text.encode())
    assert trie.decode(ids) == text


def test_what_is_no_text(trie):
    assert trie.decode(longest_first(b"\xe4\xba")) == "\ufffd"
    assert trie.decode([0, 97 + 1, 60000]) == "a"
    assert trie.piece(TOKENS.index(b"\xff\xfe") + 1) == repr(b"\xff\xfe")
    assert trie.find("人工") == trie.encode("人工")[0]
    assert trie.find("人智") is None
    assert trie.n_tokens == len(TOKENS) + 1


@pytest.mark.parametrize("line", ["5 'ab'", "x 'ab' 2", "5 'ab' 3", "5 __import__('os') 2", "5 12 2"])
def test_malformed_lines_are_named(line):
    with pytest.raises(InputError, match=r"vocab.txt, line 2: expected an id"):
        ByteTrie.parse(f"1 'a' 1\n{line}\n".encode(), "vocab.txt")


def test_a_truncated_file_lacks_bytes():
    with pytest.raises(InputError, match=r"no token for the byte 0x80"):
        ByteTrie.parse("".join(f"{i + 1} {chr(i)!r} 1\n" for i in range(128)).encode(), "vocab.txt")
