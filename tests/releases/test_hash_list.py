"""Lists of hashes in the forms people have, and the table of published files."""

from __future__ import annotations

import hashlib
import subprocess

import pytest

from llmkit.errors import InputError
from llmkit.releases.hash_list import Expected, read_hash_list
from llmkit.releases.published import KNOWN, identify


@pytest.mark.parametrize(("tool", "algorithm"), [("md5sum", "md5"), ("sha1sum", "sha1"), ("sha256sum", "sha256")])
@pytest.mark.parametrize("tag", [[], ["-b"], ["--tag"]])
def test_what_the_tools_print(tmp_path, tool, algorithm, tag):
    (tmp_path / "a file.bin").write_bytes(b"abc")
    (tmp_path / "b.json").write_bytes(b"{}")
    text = subprocess.check_output([tool, *tag, "a file.bin", "./b.json"], cwd=tmp_path)
    (tmp_path / "list").write_bytes(b"# made today\n\n" + text.replace(b"\n", b"\r\n"))
    assert read_hash_list(tmp_path / "list") == {
        "a file.bin": Expected(algorithm, hashlib.new(algorithm, b"abc").hexdigest()),
        "b.json": Expected(algorithm, hashlib.new(algorithm, b"{}").hexdigest()),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no hashes"),
        ("hello\n", ":1: expected `HASH  FILE`"),
        (f"{'0' * 33}  a\n", ":1: expected `HASH  FILE`"),
        (f"{'0' * 32}  a\n{'1' * 32}  x/a\n", ":2: states a second hash for a"),
    ],
)
def test_no_lists(tmp_path, text, message):
    (tmp_path / "list").write_text(text)
    with pytest.raises(InputError, match=message):
        read_hash_list(tmp_path / "list")


def test_the_table_is_sound():
    full = [k.sha256 for k in KNOWN if not k.is_partial]
    assert len(set(full)) == len(full)
    assert all(len(h) == 64 and set(h) <= set("0123456789abcdef") for h in full)
    for known in KNOWN:
        first, _, last = known.sha256.partition("…")
        made = first + "0" * (64 - len(first + last)) + last
        assert identify(made) is known
    assert identify("0" * 64) is None
