"""`llmkit delta xor`: the bytes, and every way in which a release or a base can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from release_world import INDEX, SHARDS, contents, write_hf, write_xor_payload


@pytest.fixture
def payload(tmp_path, base, tuned):
    return write_xor_payload(tmp_path / "xor", base, tuned)


def refused(done, out, *words, hint):
    """Exit code 2, one line that says so, the hint, and nothing left behind."""
    assert (done.code, done.out) == (2, "")
    error, told = done.err.splitlines()[-2:]
    assert error.startswith("error: ")
    for word in words:
        assert str(word) in error
    assert told.startswith("hint: ")
    assert hint in told
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.parametrize("compress", [False, True])
def test_every_file_comes_back(call, tmp_path, base, tuned, compress):
    payload = write_xor_payload(tmp_path / "xor", base, tuned, compress=compress)
    (payload / ".gitattributes").write_text("*.bin filter=lfs\n")
    out = tmp_path / "out"
    if compress:
        (payload / "README.md").write_text("What it is.\n")  # a card is not coded
    done = call("delta", "xor", base, payload, "-o", out)
    assert done.code == 0, done.err
    assert contents(out) == contents(tuned)
    assert torch.equal(
        torch.load(out / SHARDS[0])["model.embed_tokens.weight"],
        torch.load(tuned / SHARDS[0])["model.embed_tokens.weight"],
    )
    manifest = json.loads((out / "llmkit.json").read_text())
    assert manifest["recipe"] == [{"transform": "delta.xor", "base": "base", "payload": "xor"}]
    assert call("verify", out).code == 0
    assert "was written file by file (delta.xor)" in call("explain", out, "model.norm.weight").err
    (out / SHARDS[1]).write_bytes((out / SHARDS[1]).read_bytes()[:-1] + b"\1")
    assert call("verify", out).code == 1


@pytest.mark.parametrize("had_one", [False, True])
def test_a_base_with_added_tokens_of_its_own(call, tmp_path, base, tuned, had_one):
    """Coded over a base that had the file, it is coded; over one that had none, it is plain."""
    own = b'{"[PAD]": 96}'
    if had_one:
        (base / "added_tokens.json").write_bytes(own)
    payload = write_xor_payload(tmp_path / "xor", base, tuned)
    (base / "added_tokens.json").write_bytes(own)
    done = call("delta", "xor", base, payload, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert contents(tmp_path / "out") == contents(tuned)


def test_a_longer_base_is_cut(call, tmp_path, base):
    smaller = write_hf(tmp_path / "smaller", rows=80, tuned=3)
    payload = write_xor_payload(tmp_path / "xor", base, smaller)
    done = call("delta", "xor", base, payload, "-o", tmp_path / "out")
    assert done.code == 0
    assert contents(tmp_path / "out") == contents(smaller)
    assert f"{SHARDS[0]}: the base's file is cut by" in done.err


def test_json_document_and_dry_run(call, tmp_path, base, payload):
    out = tmp_path / "out"
    plan = json.loads(call("delta", "xor", base, payload, "-o", out, "--dry-run", "--json").out)
    assert plan["files"][SHARDS[0]]["with"] == str(base / SHARDS[0])
    assert plan["files"]["added_tokens.json"]["with"] is None
    assert plan["write_nbytes"] == sum(p.stat().st_size for p in payload.iterdir())
    assert not out.exists()
    text = call("delta", "xor", base, payload, "-o", out, "--dry-run").out
    assert "dry run: nothing is written" in text
    done = json.loads(call("delta", "xor", base, payload, "-o", out, "--json").out)
    assert done["files"][SHARDS[1]]["nbytes"] == (payload / SHARDS[1]).stat().st_size


def test_a_dry_run_loads_nothing_heavy(tmp_path, base, payload):
    code = (
        "import sys; from llmkit.cli.app import main; code = main(sys.argv[1:]);"
        "print(code, [m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    args = ["delta", "xor", base, payload, "-o", tmp_path / "out", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_missing_base_files(call, tmp_path, base, payload):
    out = tmp_path / "out"
    (base / "config.json").unlink()
    (base / SHARDS[1]).rename(base / "model-00002-of-00002.safetensors")
    done = call("delta", "xor", base, payload, "-o", out)
    n = len(contents(payload))
    refused(
        done, out, f"{base} lacks 2 of the {n} files that the payload needs: config.json, {SHARDS[1]}",
        hint="convert it again with the transformers version",
    )  # fmt: skip


def test_line_ends_that_git_changed(call, tmp_path, base, payload):
    name, out = "config.json", tmp_path / "out"
    text = (tmp_path / "tuned" / name).read_bytes()
    # A coded file without zeros, which git takes for text, and the base that goes with it.
    coded = (b"difference\n" * 100)[: len(text)]
    (base / name).write_bytes(bytes(a ^ b for a, b in zip(text, coded, strict=True)))
    (payload / name).write_bytes(coded)
    assert call("delta", "xor", base, payload, "-o", tmp_path / "sound").code == 0
    (payload / name).write_bytes(coded.replace(b"\n", b"\r\n"))
    done = call("delta", "xor", base, payload, "-o", out)
    refused(done, out, payload / name, "damaged by git on Windows", "CRLF", hint="core.autocrlf false")


def test_line_ends_of_the_base(call, tmp_path, base, payload):
    out = tmp_path / "out"
    (base / INDEX).write_bytes((base / INDEX).read_bytes().replace(b"\n", b"\r\n"))
    done = call("delta", "xor", base, payload, "-o", out)
    refused(done, out, base / INDEX, "Windows line ends (CRLF)", hint=f"sed -i 's/\\r$//' {base / INDEX}")


def test_another_base_of_the_same_layout(call, tmp_path, base):
    """Names, sizes and both ends of the files agree; only the weights differ."""
    payload = write_xor_payload(tmp_path / "xor", base, write_hf(tmp_path / "tuned", tuned=1))
    other, out = write_hf(tmp_path / "other", seed=7), tmp_path / "out"
    (other / "tokenizer.model").write_bytes((tmp_path / "base" / "tokenizer.model").read_bytes())
    (tmp_path / "base.md5").write_text(sums(base, "md5"))
    done = call("delta", "xor", other, payload, "-o", out, "--hashes", tmp_path / "base.md5")
    refused(done, out, f"{other / SHARDS[0]} is not the file", "2 of 5 files differ", hint="convert the base")
    # Without hashes statistics tell (check sums do not: CRC-32 of an exclusive or is that of the CRC-32s).
    done = call("delta", "xor", other, payload, "-o", out)
    refused(done, out, f"{other} is not the base that the release was made from", hint="compare its hashes")
    (tmp_path / "other.md5").write_text(sums(other, "md5"))
    done = call("delta", "xor", other, payload, "-o", tmp_path / "forced", "--hashes", tmp_path / "other.md5")
    assert done.code == 0  # whoever has its hashes from the model card knows better
    # A tuned copy of the base: only hashes tell, and that is said.
    copy = write_hf(tmp_path / "copy", tuned=2)
    (copy / "tokenizer.model").write_bytes((tmp_path / "base" / "tokenizer.model").read_bytes())
    done = call("delta", "xor", copy, payload, "-o", out)
    assert done.code == 0, done.err
    assert f"warning: nothing in an XOR release tells a tuned or rounded copy of the base from {copy}" in done.err


def test_a_base_that_was_rounded_to_bfloat16(call, tmp_path, base):
    payload = write_xor_payload(tmp_path / "xor", base, write_hf(tmp_path / "tuned", tuned=1))
    for file in SHARDS:
        state = torch.load(base / file)
        torch.save({k: v.bfloat16().half() for k, v in state.items()}, base / file)
    done = call("delta", "xor", base, payload, "-o", tmp_path / "out")
    assert f"warning: {base} was rounded to bfloat16" in done.err
    document = json.loads(call("delta", "xor", base, payload, "-o", tmp_path / "again", "--json").out)
    assert len(document["warnings"]) == 2


def test_one_bit_of_one_weight(call, tmp_path, base, payload):
    data = bytearray((base / SHARDS[1]).read_bytes())
    data[len(data) // 2] ^= 1
    (base / SHARDS[1]).write_bytes(data)
    out = tmp_path / "out"
    done = call("delta", "xor", base, payload, "-o", out)
    refused(done, out, payload / SHARDS[1], "1 of ", "wrong check sum", hint="compare its hashes")


def test_one_bit_in_a_compressed_payload(call, tmp_path, base, tuned):
    payload, out = write_xor_payload(tmp_path / "gz", base, tuned, compress=True), tmp_path / "out"
    (payload / "README.md").unlink()
    data = bytearray((base / SHARDS[0]).read_bytes())
    data[len(data) // 2] ^= 1
    (base / SHARDS[0]).write_bytes(data)
    done = call("delta", "xor", base, payload, "-o", out)
    refused(done, out, payload / SHARDS[0], "1 of ", "wrong check sum", hint="compare its hashes")


def test_a_base_of_another_size(call, tmp_path, payload):
    other, out = write_hf(tmp_path / "other", rows=60, layers_first=5), tmp_path / "out"
    done = call("delta", "xor", other, payload, "-o", out)
    refused(done, out, f"{other} is not the base that it was made from", hint="compare its hashes")


def test_the_wrong_order(call, tmp_path, base, payload):
    out = tmp_path / "out"
    done = call("delta", "xor", payload, base, "-o", out)
    refused(done, out, "the base comes first", hint=f"llmkit delta xor {base} {payload} -o OUT")


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_payload(call, tmp_path, base, payload, keep):
    data, out = (payload / SHARDS[0]).read_bytes(), tmp_path / "out"
    (payload / SHARDS[0]).write_bytes(data[: int(len(data) * keep)])
    done = call("delta", "xor", base, payload, "-o", out)
    refused(done, out, payload / SHARDS[0], "it is truncated", hint="")


def test_a_truncated_compressed_payload(call, tmp_path, base, tuned):
    payload, out = write_xor_payload(tmp_path / "gz", base, tuned, compress=True), tmp_path / "out"
    (payload / "README.md").unlink()
    data = (payload / SHARDS[0]).read_bytes()
    (payload / SHARDS[0]).write_bytes(data[:-2000])
    done = call("delta", "xor", base, payload, "-o", out)
    refused(done, out, payload / SHARDS[0], "is truncated or damaged: gzip", hint="download it again")


def test_a_missing_shard(call, tmp_path, base, payload):
    (payload / SHARDS[1]).unlink()
    out = tmp_path / "out"
    done = call("delta", "xor", base, payload, "-o", out)
    refused(done, out, f"1 of the 2 weight files that {INDEX} names are missing: {SHARDS[1]}", hint="download")


def test_git_lfs_pointers(call, tmp_path, base, payload):
    (payload / SHARDS[0]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    out = tmp_path / "out"
    refused(call("delta", "xor", base, payload, "-o", out), out, "git-lfs pointer", hint="git lfs pull")


def test_the_folder_above_the_payload(call, tmp_path, base, payload):
    above, out = tmp_path / "repository", tmp_path / "out"
    above.mkdir()
    payload.rename(above / "xor_encoded_files")
    (above / "README.md").write_text("A model.")
    done = call("delta", "xor", base, above, "-o", out)
    refused(done, out, f"{above} holds no XOR payload", hint=str(above / "xor_encoded_files"))


def test_wrong_paths(call, tmp_path, base, payload):
    out = tmp_path / "out"
    done = call("delta", "xor", base, tmp_path / "nope", "-o", out)
    refused(done, out, f"{tmp_path / 'nope'} does not exist; the payload", hint="two folders")
    done = call("delta", "xor", base / SHARDS[0], payload, "-o", out)
    refused(done, out, f"{base / SHARDS[0]} is no folder; the base", hint="two folders")


def test_plain_models_are_no_payload(call, tmp_path, base, tuned):
    out = tmp_path / "out"
    done = call("delta", "xor", base, tuned, "-o", out)
    refused(done, out, f"{tuned} is no XOR payload", hint=f"llmkit delta apply {base} {tuned}")


def test_delta_apply_points_here(call, tmp_path, base, payload):
    out = tmp_path / "out"
    done = call("delta", "apply", base, payload, "-o", out)
    refused(done, out, f"{payload} is an XOR release", hint=f"llmkit delta xor {base} {payload} -o OUT")
    done = call("delta", "apply", payload, base, "-o", out)
    refused(done, out, "the base comes first", hint=f"llmkit delta xor {base} {payload} -o OUT")


def sums(folder, algorithm, *, names=None):
    return "".join(
        f"{hashlib.new(algorithm, data).hexdigest()}  ./{name}\n"
        for name, data in contents(folder).items()
        if names is None or name in names
    )


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_stated_hashes(call, tmp_path, base, tuned, payload, algorithm):
    (tmp_path / "base.sums").write_text(sums(base, algorithm))
    (tmp_path / "out.sums").write_text(sums(tuned, algorithm))
    stated = ["--hashes", tmp_path / "base.sums", "--expect", tmp_path / "out.sums"]
    done = call("delta", "xor", base, payload, "-o", tmp_path / "out", *stated)
    assert done.code == 0, done.err
    n = len(contents(base))
    assert f"base.sums confirms {n} of {n} base files" in done.err
    assert f"{n + 2} of {n + 2} files have the expected hash" in done.out


def test_a_base_with_other_hashes(call, tmp_path, base, payload):
    (tmp_path / "base.md5").write_text(sums(base, "md5"))
    (base / "tokenizer.model").write_bytes(b"other")
    out = tmp_path / "out"
    done = call("delta", "xor", base, payload, "-o", out, "--hashes", tmp_path / "base.md5")
    found = hashlib.md5(b"other").hexdigest()
    refused(done, out, base / "tokenizer.model", f"its md5 is {found}", "1 of 5 files differ", hint="convert the base")


def test_a_result_with_other_hashes(call, tmp_path, base, payload):
    (tmp_path / "out.md5").write_text(f"{'0' * 32} *added_tokens.json\n")
    out = tmp_path / "out"
    done = call("delta", "xor", base, payload, "-o", out, "--expect", tmp_path / "out.md5")
    refused(done, out, payload / "added_tokens.json", "expected " + "0" * 32, hint="convert the base")


def test_lists_that_fit_nothing(call, tmp_path, base, payload):
    (tmp_path / "list").write_text(f"{'0' * 64}  another.bin\n")
    for option in ("--hashes", "--expect"):
        done = call("delta", "xor", base, payload, "-o", tmp_path / "out", option, tmp_path / "list")
        assert done.code == 2
        assert f"{tmp_path / 'list'} names none of the " in done.err


def test_an_interrupted_run_resumes(call, tmp_path, base, tuned, payload, monkeypatch):
    from llmkit.releases import run

    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(run, "check_whole", interrupt)
        done = call("delta", "xor", base, payload, "-o", out)
    assert done.code == 130
    assert "it goes on where it stopped" in done.err
    assert not out.exists()
    # One of the written files is damaged meanwhile: it is written again.
    partial = tmp_path / "out.partial"
    with (partial / SHARDS[0]).open("r+b") as file:
        file.write(b"????")
    done = call("delta", "xor", base, payload, "-o", out)
    assert done.code == 0, done.err
    assert contents(out) == contents(tuned)
    manifest = json.loads((out / "llmkit.json").read_text())
    assert manifest["run"]["steps_resumed"] == len(contents(tuned)) - 1


def test_an_existing_output(call, tmp_path, base, tuned, payload):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    done = call("delta", "xor", base, payload, "-o", out)
    assert done.code == 2
    assert "already exists" in done.err
    assert os.listdir(out) == ["config.json"]
    done = call("delta", "xor", base, payload, "-o", out, "--overwrite")
    assert done.code == 2
    assert "config.json, which would be deleted" in done.err
    assert call("delta", "xor", base, payload, "-o", out, "--overwrite", "--force").code == 0
    assert contents(out) == contents(tuned)
