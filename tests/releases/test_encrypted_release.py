"""`llmkit delta decrypt`: the bytes, and every way in which a key or a release can be wrong."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from release_world import INDEX, SHARDS, contents, encrypt, write_encrypted, write_key
from test_xor_release import refused

from llmkit.errors import InputError
from llmkit.pipeline.target import Target
from llmkit.releases.encrypted import plan_decrypt
from llmkit.releases.published import KEY_FILE, PublishedFile
from llmkit.releases.run import run_decoding
from llmkit.releases.streams import BlockwiseKey
from llmkit.tensors.source import SourceFile


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "7B" / "consolidated.00.pth"
    write_key(path)
    return path


@pytest.fixture
def release(tmp_path, tuned, key):
    folder = write_encrypted(tmp_path / "enc", tuned, key.read_bytes())
    (folder / "README.md").write_text("Not encrypted.")
    return folder


def enc(folder, name):
    return next(p for p in folder.iterdir() if p.name.startswith(name + "."))


def test_every_file_comes_back(call, tmp_path, tuned, key, release):
    out = tmp_path / "out"
    done = call("delta", "decrypt", key, release, "-o", out)
    assert done.code == 0, done.err
    assert contents(out) == contents(tuned)
    n = len(contents(tuned))
    assert f"{n} of {n} files have the SHA-256 that the release says" in done.out
    assert "1 other files of" in done.err
    assert call("verify", out).code == 0
    manifest = json.loads((out / "llmkit.json").read_text())
    assert manifest["files"][SHARDS[0]]["sha256"] == hashlib.sha256((tuned / SHARDS[0]).read_bytes()).hexdigest()


def test_single_files_for_another_program(call, tmp_path, key):
    data = b"lmgg" + random.Random(0).randbytes(3000)
    path = tmp_path / f"ggml.bin.{hashlib.sha256(data).hexdigest()}.enc"
    path.write_bytes(encrypt(data, key.read_bytes()))
    out = tmp_path / "out"
    assert call("delta", "decrypt", key, path, "-o", out).code == 0
    assert contents(out) == {"ggml.bin": data}
    assert call("verify", out).code == 0
    assert call("delta", "decrypt", key, path, "-o", out, "--overwrite").code == 0


def test_blocks_of_the_real_size(call, tmp_path):
    """Key and data of several blocks of 10 MiB, a short last block in both; the stream is numpy's, written again."""
    block = 10 * 2**20
    generator = np.random.default_rng(0)
    key = generator.integers(0, 256, 2 * block + 777, dtype=np.uint8)
    data = generator.integers(0, 256, 4 * block + 123_457, dtype=np.uint8)
    parts = [key[i : i + block] for i in range(0, len(key), block)]
    stream = np.concatenate([np.resize(parts[i % len(parts)], block) for i in range(5)])[: len(data)]
    digest = hashlib.sha256(data.tobytes())
    (tmp_path / "key").write_bytes(key.tobytes())
    path = tmp_path / f"data.dat.{digest.hexdigest()}.enc"
    path.write_bytes(digest.digest() + (data ^ stream).tobytes())
    assert call("delta", "decrypt", tmp_path / "key", path, "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "data.dat").read_bytes() == data.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 100), st.integers(0, 150), st.integers(0, 90), st.integers(1, 16))
def test_the_key_at_any_place(tmp_path_factory, n_key, position, n, block):
    key = random.Random(n_key).randbytes(n_key)
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_bytes(key)
    data = bytes(position + n)
    expected = encrypt(data, key, block)[32:][position:]
    found = bytearray(n)
    BlockwiseKey(SourceFile(path), block).fill(memoryview(found), position)
    assert bytes(found) == expected


def test_the_wrong_key(call, tmp_path, release, key):
    """A shard of 13B begins as the key does; it is named, because its hash is published."""
    out, wrong = tmp_path / "out", tmp_path / "13B" / "consolidated.00.pth"
    digest = hashlib.sha256(write_key(wrong, seed=5)).hexdigest()
    table = (KEY_FILE, PublishedFile(digest, "consolidated.00.pth", "LLaMA-13B", "C"))
    with pytest.raises(InputError, match=f"{wrong} is not the key that it was encrypted with") as error:
        run_decoding(plan_decrypt(wrong, [release], table=table), Target(out))
    told = f"{wrong} is consolidated.00.pth of LLaMA-13B; the key of these releases is consolidated.00.pth of LLaMA"
    assert told in error.value.hint
    assert not out.exists()
    unknown = tmp_path / "unknown.pth"
    write_key(unknown, seed=6)
    done = call("delta", "decrypt", unknown, release, "-o", out)
    refused(done, out, "is not the key", hint=f"{unknown} has sha256 ")


def test_a_damaged_file_with_the_right_key(tmp_path, release, key):
    out, path = tmp_path / "out", enc(release, SHARDS[1])
    digest = hashlib.sha256(key.read_bytes()).hexdigest()
    mine = PublishedFile(digest, KEY_FILE.file, KEY_FILE.release, "C")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{path}.* the file is damaged") as error:
        run_decoding(plan_decrypt(key, [release], table=(mine,)), Target(out))
    assert f"{key} is the right key" in error.value.hint
    assert not out.exists()


def test_damage_that_only_the_hash_of_the_whole_tells(call, tmp_path, key, release):
    """Files above a mebibyte are decoded before their hash is known."""
    data = random.Random(1).randbytes(2**20 + 5000)
    folder, out = tmp_path / "big", tmp_path / "out"
    folder.mkdir()
    path = folder / f"notes.dat.{hashlib.sha256(data).hexdigest()}.enc"
    coded = bytearray(encrypt(data, key.read_bytes()))
    coded[-1] ^= 1
    path.write_bytes(coded)
    done = call("delta", "decrypt", key, folder, "-o", out)
    refused(done, out, path, "decodes to sha256", hint=f"{key} has sha256")


def test_truncated_files(call, tmp_path, key, release):
    out, path = tmp_path / "out", enc(release, SHARDS[0])
    data = path.read_bytes()
    path.write_bytes(data[:-500])
    refused(call("delta", "decrypt", key, release, "-o", out), out, path, "the file is damaged", hint=str(key))
    path.write_bytes(data[:20])
    done = call("delta", "decrypt", key, release, "-o", out)
    refused(done, out, path, "is truncated: 20 bytes", hint="download it again")


def test_a_renamed_file(call, tmp_path, key, release):
    out, path = tmp_path / "out", enc(release, "config.json")
    path.rename(path.with_name(f"config.json.{'ab' * 32}.enc"))
    done = call("delta", "decrypt", key, release, "-o", out)
    refused(done, out, "damaged or renamed", "its name abababab", hint="download it again")


def test_a_file_without_its_hash_in_the_name(call, tmp_path, tuned, key, release):
    path = enc(release, "config.json")
    path.rename(path.with_name("config.json.enc"))
    done = call("delta", "decrypt", key, release, "-o", tmp_path / "out")
    assert done.code == 0
    assert "config.json.enc has no sha256 in its name" in done.err
    assert contents(tmp_path / "out") == contents(tuned)


def test_two_files_of_one_name(call, tmp_path, key, release):
    path, out = enc(release, "config.json"), tmp_path / "out"
    (release / "config.json.enc").write_bytes(path.read_bytes())
    done = call("delta", "decrypt", key, release, "-o", out)
    assert done.code == 2
    assert "are both config.json: leave one out" in done.err


def test_a_missing_shard(call, tmp_path, key, release):
    out = tmp_path / "out"
    enc(release, SHARDS[1]).unlink()
    done = call("delta", "decrypt", key, release, "-o", out)
    refused(done, out, f"1 of the 2 weight files that {INDEX} names are missing: {SHARDS[1]}", hint="download")


def test_the_wrong_order(call, tmp_path, key, release):
    out = tmp_path / "out"
    done = call("delta", "decrypt", release, key, "-o", out)
    refused(done, out, "the key comes first", hint=f"llmkit delta decrypt {key} {release} -o OUT")


def test_a_folder_as_key(call, tmp_path, key, release):
    out = tmp_path / "out"
    done = call("delta", "decrypt", key.parent, release, "-o", out)
    refused(done, out, f"{key.parent} is a folder; the key is one file", hint=f"give {key}")


def test_missing_paths(call, tmp_path, key, release):
    out = tmp_path / "out"
    done = call("delta", "decrypt", tmp_path / "nope.pth", release, "-o", out)
    refused(done, out, "nope.pth: no such file", hint="LLaMA-7B")
    done = call("delta", "decrypt", key, tmp_path / "nope.enc", "-o", out)
    assert (done.code, done.out) == (2, "")
    assert "nope.enc: no such file or folder" in done.err


def test_the_key_is_compared_first(call, tmp_path, tuned, key, release):
    digest = hashlib.sha256(key.read_bytes()).hexdigest()
    (tmp_path / "good").write_text(f"SHA256 (consolidated.00.pth) = {digest}\n")
    (tmp_path / "bad").write_text(f"{'0' * 64}  consolidated.00.pth\n")
    out = tmp_path / "out"
    done = call("delta", "decrypt", key, release, "-o", out, "--hashes", tmp_path / "bad")
    refused(done, out, f"its sha256 is {digest}", f"{tmp_path / 'bad'} says {'0' * 64}", hint=KEY_FILE.sha256)
    done = call("delta", "decrypt", key, release, "-o", out, "--hashes", tmp_path / "good")
    assert done.code == 0
    assert "confirms the key" in done.err
    assert contents(out) == contents(tuned)


def test_the_commands_point_at_each_other(call, tmp_path, base, key, release, tuned):
    from release_world import write_xor_payload

    out = tmp_path / "out"
    xored = write_xor_payload(tmp_path / "xor", base, tuned)
    done = call("delta", "decrypt", key, xored, "-o", out)
    refused(done, out, f"{xored} is an XOR payload", hint=f"llmkit delta xor BASE {xored} -o OUT")
    done = call("delta", "xor", base, release, "-o", out)
    refused(done, out, "is an encrypted release", hint=f"llmkit delta decrypt KEY {release} -o OUT")
    done = call("delta", "decrypt", key, base, "-o", out)
    refused(done, out, f"{base} holds no .enc files, but weights", hint=f"llmkit delta apply BASE {base} -o OUT")
    done = call("inspect", release)
    refused(done, out, "is an encrypted release: it must be decoded first", hint=f"delta decrypt KEY {release} -o OUT")
    done = call("inspect", xored)
    refused(done, out, "is an XOR release: it must be decoded first", hint=f"delta xor BASE {xored} -o OUT")
    done = call("delta", "apply", key.parent, release, "-o", out)
    refused(done, out, "is an encrypted release", hint=f"llmkit delta decrypt {key} {release} -o OUT")
