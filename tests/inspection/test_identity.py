"""`inspect --identify`: published files by their hashes, and a hash of contents that no container changes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.cli.app import main
from llmkit.inspection.identity import identify_model
from llmkit.releases.published import PublishedFile

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}


def expected_hash(state: dict[str, torch.Tensor]) -> str:
    """The definition, by torch and hashlib."""
    text = ""
    for name in sorted(state):
        data = state[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        shape = ", ".join(map(str, state[name].shape))
        text += f'["{name}", "{NAMES[state[name].dtype]}", [{shape}], "{hashlib.sha256(data).hexdigest()}"]\n'
    return hashlib.sha256(text.encode()).hexdigest()


def random_state(seed: int, n: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    state = {}
    for i in range(n):
        shape = [(3, 5), (7,), (), (0, 4), (2, 3, 4)][int(torch.randint(5, (), generator=g))]
        dtype = list(NAMES)[int(torch.randint(4, (), generator=g))]
        state[f"model.layers.{i}.w"] = (torch.randn(shape, generator=g) * 50).to(dtype)
    return state


def write(folder: Path, state: dict[str, torch.Tensor], n_shards: int, *, pickled: bool) -> Path:
    """One file, or shards with an index, in either container."""
    folder.mkdir(parents=True)
    suffix, stem = (".bin", "pytorch_model") if pickled else (".safetensors", "model")
    names, weight_map = list(state), {}
    for i in range(n_shards):
        file = f"{stem}{suffix}" if n_shards == 1 else f"{stem}-{i + 1:05d}-of-{n_shards:05d}{suffix}"
        part = {n: state[n] for n in names[i::n_shards]}
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if n_shards > 1:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 3), st.booleans(), st.integers(1, 4))
def test_no_container_changes_the_content_hash(tmp_path_factory, seed, n, n_shards, pickled, workers):
    state = random_state(seed, n)
    folder = write(tmp_path_factory.mktemp("m") / "model", state, min(n_shards, n), pickled=pickled)
    assert identify_model(open_checkpoint(folder), workers=workers).content == expected_hash(state)


def test_a_view_has_the_hash_of_its_values(tmp_path):
    x = torch.randn(6, 4)
    (tmp_path / "a").mkdir()
    torch.save({"w": x.T}, tmp_path / "a" / "pytorch_model.bin")
    assert identify_model(open_checkpoint(tmp_path / "a")).content == expected_hash({"w": x.T.contiguous()})


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"w": s["w"].to(torch.float32)},
        lambda s: s | {"w": s["w"].reshape(4, 4)},
        lambda s: {"v": s["w"]},
        lambda s: s | {"w": (s["w"].view(torch.int16) ^ 1).view(torch.float16)},
    ],
    ids=["dtype", "shape", "name", "bits"],
)
def test_what_changes_the_content_hash(tmp_path, change):
    state = {"w": torch.randn(2, 8).half()}
    hashes = [
        identify_model(open_checkpoint(write(tmp_path / str(i), s, 1, pickled=False))).content
        for i, s in enumerate([state, change(state)])
    ]
    assert hashes[0] != hashes[1]


@pytest.fixture
def model(tmp_path):
    state = {f"w{i}": (torch.randn(40, 64, generator=torch.Generator().manual_seed(i)) * 0.02).half() for i in range(4)}
    folder = write(tmp_path / "model", state, 2, pickled=True)
    (folder / "tokenizer.model").write_bytes(b"\n\x05")
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_published_files_are_named(model):
    shards = sorted(model.glob("*.bin"))
    tokenizer = sha256(model / "tokenizer.model")
    table = (
        PublishedFile(sha256(shards[0]), "consolidated.00.pth", "A-7B", "C"),
        PublishedFile(f"{sha256(shards[1])[:8]}…{sha256(shards[1])[-5:]}", shards[1].name, "A-7B", "C"),
        PublishedFile(tokenizer, "tokenizer.model", "A's tokenizer", "P"),
    )
    found = identify_model(open_checkpoint(model), table=table)
    assert found.releases == {"A-7B": 2}
    by_name = {f.name: f for f in found.files}
    assert set(by_name) == {shards[0].name, shards[1].name, "tokenizer.model"}
    assert by_name["tokenizer.model"].release == "A's tokenizer"
    assert by_name["tokenizer.model"].sha256 == tokenizer
    assert [by_name[s.name].is_prefix_match for s in shards] == [False, True]
    assert by_name[shards[0].name].source == "github.com/ymcui/Chinese-LLaMA-Alpaca, SHA256.md"
    assert f"{shards[0].name} was published as consolidated.00.pth" in found.notes
    assert any("(prefix match)" in note for note in found.notes)
    assert not any("not in llmkit's table" in note for note in found.notes)


def test_an_unknown_file_and_what_it_means(model, capsys):
    assert main(["inspect", str(model), "--identify"]) == 0
    text = capsys.readouterr().out
    assert "identified as  no published model in the table" in text
    assert sha256(model / "tokenizer.model") in text
    assert "2 weight files are not in llmkit's table of published hashes" in text
    assert "the version of torch" in text
    assert main(["inspect", str(model), "--identify", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["identity"]
    assert document["content"] == expected_hash({k: v for p in model.glob("*.bin") for k, v in torch.load(p).items()})
    assert document["content"] in text
    assert 0.05 < document["bf16_share"] < 0.25
    assert main(["inspect", str(model), "--identify", "-q"]) == 0
    assert capsys.readouterr().out.strip() == document["content"]


def test_rounded_weights_are_said(tmp_path):
    state = {f"w{i}": torch.randn(64, 64).bfloat16().half() for i in range(3)}
    found = identify_model(open_checkpoint(write(tmp_path / "model", state, 1, pickled=False)))
    assert found.bf16_share > 0.99
    assert any("were rounded to bfloat16" in note for note in found.notes)


def test_a_file_that_shrinks_meanwhile(model):
    from llmkit.errors import InputError

    ckpt = open_checkpoint(model)
    shard = sorted(model.glob("*.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(InputError, match="ended at byte"):
        identify_model(ckpt)
