"""Texts: of files and pipes, not of devices; YAML within a budget."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from llmkit.errors import InputError
from llmkit.formats.text_file import read_text, read_yaml


def test_texts(tmp_path: Path) -> None:
    for n, (data, text) in enumerate([(b"\xef\xbb\xbfa\r\nb", "a\nb"), ("é\n".encode(), "é\n"), (b"", "")]):
        (tmp_path / str(n)).write_bytes(data)
        assert read_text(tmp_path / str(n)) == text
        assert text == (tmp_path / str(n)).read_text("utf-8-sig")


def test_a_pipe_with_a_writer_and_one_without(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="nobody writes"):
        read_text(pipe)
    source, target = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(target, b"x" * 100_000), os.close(target)))
    writer.start()
    assert read_text(Path(f"/proc/self/fd/{source}")) == "x" * 100_000
    writer.join()
    os.close(source)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", ".", "absent", "a\0b", "x" * 5000])
def test_what_is_no_text(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_text(tmp_path / name)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"a\xff")
    with pytest.raises(InputError, match="byte 1"):
        read_text(tmp_path / "t")
    with pytest.raises(InputError, match="at most 1"):
        read_text(tmp_path / "t", max_nbytes=1)


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    shared = [1, 2]
    for document in ({"a": 1, "b": [1, 2.5, None]}, {"a": shared, "b": shared}):
        path.write_text(yaml.dump(document))
        assert read_yaml(path) == document
    bomb = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 30))])
    for text in (bomb, "[" * 5000, "a: [", "a: 2026-99-99", "\x01"):
        path.write_text(text)
        with pytest.raises(InputError):
            read_yaml(path)


def test_what_is_no_yaml_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text, said in (
        ("a: 1\n\tb: 2", "line 2 is not YAML: .*t"),
        ("a: 1\n? [1]\n: 4", "line 2 is not YAML: found unhashable"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=f"c.yaml, {said}"):
            read_yaml(path)


@pytest.mark.parametrize("encoding", ["UTF-16", "GB18030"])
def test_texts_in_other_encodings_are_named_with_the_command_that_converts(tmp_path, encoding):
    path = tmp_path / "a text.txt"
    path.write_text("从前有一座山，山里有一座庙。 ABC " * 9, encoding=encoding)
    with pytest.raises(InputError, match=f"a text.txt is in {encoding}, expected UTF-8") as caught:
        read_text(path)
    command = caught.value.hint.removesuffix(", and give that").replace("utf8.txt", f"{tmp_path}/utf8.txt")
    subprocess.run(command, shell=True, check=True)
    assert read_text(tmp_path / "utf8.txt").startswith("从前有一座山")


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    os.truncate(tmp_path / "x.txt", 2**36)
    with pytest.raises(InputError, match="next to none of them on the disk"):
        read_text(tmp_path / "x.txt")
