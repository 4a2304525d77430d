"""What JSON from outside may cost, and what it must not hold."""

from __future__ import annotations

import json
import time

import pytest

from llmkit.errors import InputError
from llmkit.formats.json_text import MAX_DEPTH, parse_json, parse_object, read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' * 100_000, f"nested deeper than {MAX_DEPTH}"),
        ("[" * 200 + "]" * 200, f"nested deeper than {MAX_DEPTH}"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH}"),
        ("9" * 5000, "a number of 5000 digits"),
        ("9" * 301, "a number of 301 digits"),
        (r'{"a": "\ud800"}', "half of a surrogate pair"),
        (r'{"\uDC00": 1}', "half of a surrogate pair"),
        ("\ufeff{}", "BOM"),
        ("{", "Expecting"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_sound_document_is_refused(text, message):
    with pytest.raises(InputError, match=rf"^here is not valid JSON: .*{message}"):
        parse_json(text, "here")


def test_bytes_that_are_no_utf_8_are_refused():
    with pytest.raises(InputError, match="can't decode byte 0xe9"):
        parse_json('{"a": "é"}'.encode("latin1"), "here")


def test_what_transformers_writes_is_read():
    text = r'{"a": [Infinity, -Infinity, 1e999], "n": 1000000000000000019884624838656, "pair": "\ud83d\ude00", "n": 2}'
    assert parse_json(text, "here") == {"a": [float("inf"), float("-inf"), float("inf")], "n": 2, "pair": "😀"}
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep, "here") == json.loads(deep)
    assert parse_json('["' + "[{" * 10_000 + '"]', "here") == ["[{" * 10_000]  # brackets in texts have no depth


@pytest.mark.parametrize(
    ("text", "message"),
    [("NaN", "NaN is no JSON number"), ("[-Infinity]", "no JSON number"), ("1e999", "beyond what a float holds"),
     ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' occurs twice"), ('[{"a": {"b": 1}, "a": 2}]', "'a' occurs twice"),
     ('{"a:b": 1, "c": ":", "d": "{[", "a:b": 2}', "'a:b' occurs twice")],
)  # fmt: skip
def test_a_strict_document_is_as_the_standard_has_it(text, message):
    with pytest.raises(InputError, match=message):
        parse_json(text, "here", is_strict=True)


def test_a_key_twice_among_many_is_found_in_linear_time():
    text = "{" + ",".join(f'"k{i}":0' for i in range(300_000)) + ',"z":1,"z":2}'
    began = time.monotonic()
    with pytest.raises(InputError, match="'z' occurs twice"):
        parse_json(text, "here", is_strict=True)
    assert time.monotonic() - began < 10  # quadratic: minutes


def test_size_and_count_are_bounded():
    with pytest.raises(InputError, match="expected at most 10"):
        parse_json("[1, 2, 3, 4]", "here", max_nbytes=10)
    with pytest.raises(InputError, match="6000001 objects and arrays"):
        parse_json("[" + "[]," * 6_000_000 + "1]", "here")


def test_an_object_is_asked_for_by_name():
    for text, kind in (("[]", "an array"), ("null", "null"), ("true", "true or false"), ("1", "a number")):
        with pytest.raises(InputError, match=f"here: expected an object, found {kind}"):
            parse_object(text, "here")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(InputError, match="no regular file"):
        read_json(tmp_path)
