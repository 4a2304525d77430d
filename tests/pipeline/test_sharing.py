"""Files that an output shares: reflinks, hard links and copies, and what is noted of them."""

from __future__ import annotations

import errno
import os

import pytest
from xxhash import xxh3_128

from llmkit.errors import InputError
from llmkit.pipeline import sharing
from llmkit.pipeline.progress import NO_PROGRESS
from llmkit.pipeline.sharing import SharedFiles, share_file

DATA = bytes(range(256)) * 5000
TIME = 1_600_000_000_123_456_789


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(DATA)
    os.utime(path, ns=(TIME, TIME))
    return path


def refuse(number):
    def fails(*_args):
        raise OSError(number, os.strerror(number))

    return fails


def clone(target, request, source):
    """What a file system does that has reflinks."""
    assert request == 0x40049409  # FICLONE of linux/fs.h
    assert os.write(target, os.pread(source, 1 << 30, 0)) == len(DATA)
    return 0


def test_on_this_disk(source, tmp_path):
    """The real thing, whatever the disk has. Run with --basetemp on btrfs or xfs to see a reflink."""
    target = tmp_path / "target"
    found = share_file(source, target)
    assert target.read_bytes() == DATA
    assert target.stat().st_mtime_ns == TIME
    assert (target.stat().st_ino == source.stat().st_ino) == (found == "hard link")
    with source.open("r+b") as file:
        file.write(b"changed")
    assert target.read_bytes()[:7] == (b"changed" if found == "hard link" else DATA[:7])


def test_a_reflink_comes_first(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sharing.fcntl, "ioctl", clone)
    monkeypatch.setattr(os, "link", refuse(errno.EIO))
    assert share_file(source, tmp_path / "target") == "reflink"
    stat = (tmp_path / "target").stat()
    assert (stat.st_nlink, stat.st_mtime_ns) == (1, TIME)
    assert (tmp_path / "target").read_bytes() == DATA


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS])
def test_then_a_hard_link_then_a_copy(source, tmp_path, monkeypatch, number):
    monkeypatch.setattr(sharing.fcntl, "ioctl", refuse(number))
    assert share_file(source, tmp_path / "a") == "hard link"
    assert (tmp_path / "a").samefile(source)
    monkeypatch.setattr(os, "link", refuse(errno.EXDEV))
    assert share_file(source, tmp_path / "b") == "copy"
    assert not (tmp_path / "b").samefile(source)
    assert (tmp_path / "b").read_bytes() == DATA
    assert (tmp_path / "b").stat().st_mtime_ns == TIME


def test_a_symbolic_link_is_followed(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sharing.fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    (tmp_path / "blob").symlink_to(source)
    assert share_file(tmp_path / "blob", tmp_path / "target") == "hard link"
    assert not (tmp_path / "target").is_symlink()


def test_what_is_wrong_with_the_disk_is_said(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sharing.fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    monkeypatch.setattr(os, "link", refuse(errno.EROFS))
    with pytest.raises(OSError, match="Read-only") as caught:
        share_file(source, tmp_path / "target")
    assert caught.value.errno == errno.EROFS
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(("hash_all", "limit", "is_hashed"), [(True, 0, True), (False, 0, False), (False, 2**26, True)])
def test_hashes(source, hash_all, limit, is_hashed):
    with SharedFiles({"x": source}, hash_all=hash_all, progress=NO_PROGRESS, small_nbytes=limit) as shared:
        entry = shared.entry("x", "hard link")
    assert shared.nbytes == (len(DATA) if is_hashed else 0)
    wanted = {"nbytes": len(DATA), "linked": str(source), "sharing": "hard link", "mtime_ns": TIME}
    assert entry == (wanted | {"xxh3": xxh3_128(DATA).hexdigest()} if is_hashed else wanted)


def test_a_source_that_changes_meanwhile_is_an_error(source):
    with SharedFiles({"x": source}, hash_all=True, progress=NO_PROGRESS) as shared:
        shared.entry("x", "hard link")
        source.write_bytes(DATA)  # the same bytes, written again: who knows what comes next
        with pytest.raises(InputError, match="was changed while it was linked") as caught:
            shared.entry("x", "hard link")
    assert "run the command again" in caught.value.hint
