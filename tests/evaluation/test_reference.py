"""Distributions in a file: the divergences of the model computed along, and files that are no references."""

from __future__ import annotations

import math

import pytest
import torch

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.cli.app import main
from llmkit.decoder import load_decoder
from llmkit.errors import InputError, OutputError
from llmkit.evaluation import reference as module
from llmkit.evaluation.divergence import ModelDistributions, measure_divergence
from llmkit.evaluation.perplexity import measure_perplexity
from llmkit.evaluation.reference import ReferenceWriter, read_reference, subject_of
from llmkit.tensors.constant import constant
from llmkit.transforms.vocab import open_tokenizer

TEXT = "a text"
IDS = torch.randint(0, 380, (227,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module")
def pair(tiny_llama):
    base = open_checkpoint(tiny_llama)
    name = "model.layers.1.mlp.down_proj.weight"
    moved = base.tensors[name].load()
    moved = moved + 0.05 * moved.std() * torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))
    return load_decoder(base), load_decoder(base.derive(tensors={**base.tensors, name: constant(moved)}))


def store(path, model, context=64, stride=64, ids=IDS):
    with ReferenceWriter(path, "first", subject_of(TEXT, ids, context, stride)) as writer:
        return measure_perplexity(model, ids, context=context, stride=stride, keep=writer.add)


def test_a_reference_is_named_where_a_tokenizer_is_wanted(pair, tmp_path):
    store(tmp_path / "ref", pair[0])
    with pytest.raises(InputError, match=r"ref is a reference of llmkit perplexity, .*; expected a tokenizer"):
        open_tokenizer(tmp_path / "ref")


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (64, 40), (226, 226)])
def test_a_stored_model_diverges_as_one_that_is_computed_along(pair, tmp_path, context, stride):
    first, second = pair
    before = store(tmp_path / "ref", first, context, stride)
    stored = read_reference(tmp_path / "ref")
    stored.check(subject_of(TEXT, IDS, context, stride))
    found = measure_divergence(stored, second, IDS, context=context, stride=stride)
    expected = measure_divergence(ModelDistributions(first), second, IDS, context=context, stride=stride)
    assert found.kl > 1e-4
    for name in ("kl", "kl_median", "kl_99"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3)
    assert (found.before, found.after, found.flipped) == (before, expected.after, expected.flipped)
    assert found.change == expected.change


def test_the_change_and_its_errors_are_paired(pair):
    first, second = pair
    found = measure_divergence(ModelDistributions(first), second, IDS, context=64)
    changes = []
    for start in range(0, 227, 64):
        ids = torch.tensor([IDS[start : start + 64]])
        a, b = (model.logits(model.hidden(ids)[0, :-1]).log_softmax(-1) for model in pair)
        at = (torch.arange(ids.shape[1] - 1), ids[0, 1:])
        changes.append((a[at] - b[at]).double())
    every = torch.cat(changes)
    assert found.change.value == pytest.approx(float(every.mean()), abs=1e-6)
    assert found.ratio == pytest.approx(found.after.perplexity / found.before.perplexity, rel=1e-6)
    assert found.change.stderr == pytest.approx(float(every.std()) / math.sqrt(len(every)), rel=1e-4)
    clustered = math.sqrt(sum(float((x - every.mean()).sum()) ** 2 for x in changes)) / len(every)
    assert found.change.stderr_clustered == pytest.approx(clustered, rel=1e-3)
    assert found.ratio_interval[0] < found.ratio < found.ratio_interval[1]


def test_what_is_all_but_impossible_is_stored_too(tmp_path):
    logits = torch.tensor([[0.0, -200.0, -math.inf], [0.0, 0.0, 0.0], [5.0, 4.0, -20.0]])
    with ReferenceWriter(tmp_path / "ref", "m", subject_of(TEXT, [0, 1, 2, 2], 4, 4)) as writer:
        writer.add(logits, torch.tensor([0, 1, 2]))
    (piece,) = read_reference(tmp_path / "ref").pieces([0, 1, 2, 2], [(0, 4, 1)])
    assert torch.allclose(piece.log_p.exp(), logits.softmax(-1), atol=1e-4)
    assert piece.nll.tolist() == pytest.approx([0.0, math.log(3), 25.313262], rel=1e-6)
    assert piece.top[[0, 2]].tolist() == [0, 0]


def test_another_text_tokenizer_or_window_is_refused(pair, tmp_path):
    store(tmp_path / "ref", pair[0])
    stored = read_reference(tmp_path / "ref")
    for args, message in (
        (("other", IDS, 64, 64), "another text"),
        ((TEXT, IDS[:-1], 64, 64), "227 other tokens of this text, which has 226 here: first has another tokenizer"),
        ((TEXT, IDS, 32, 32), "windows of 64 tokens every 64, not of 32 every 32"),
        ((TEXT, IDS, 64, 32), "windows of 64 tokens every 64, not of 64 every 32"),
    ):
        with pytest.raises(InputError, match=message):
            stored.check(subject_of(*args))


def test_another_vocabulary_is_refused(pair, tmp_path):
    with ReferenceWriter(tmp_path / "ref", "m", subject_of(TEXT, IDS[:9], 9, 9)) as writer:
        writer.add(torch.randn(8, 400), torch.tensor(IDS[1:9]))
    with pytest.raises(InputError, match="gives 400 logits a token, the second 380"):
        measure_divergence(read_reference(tmp_path / "ref"), pair[1], IDS[:9], context=9)


def test_nothing_stays_of_a_run_that_ended_early(pair, tmp_path):
    class Stop(Exception):
        pass

    def stop(logits, targets):
        writer.add(logits, targets)
        assert len(list(tmp_path.iterdir())) == 1
        raise Stop

    with pytest.raises(Stop), ReferenceWriter(tmp_path / "ref", "m", subject_of(TEXT, IDS, 64, 64)) as writer:
        measure_perplexity(pair[0], IDS, context=64, keep=stop)
    assert list(tmp_path.iterdir()) == []


def test_two_that_write_one_reference_are_kept_apart(tmp_path):
    """The second is told, and neither writes into the file of the other."""
    logits, targets = torch.randn(8, 40), torch.tensor(IDS[1:9]) % 40
    subject = subject_of(TEXT, IDS[:9], 9, 9)
    (tmp_path / "ref.partial").write_bytes(b"what a killed run left" * 10_000)
    with ReferenceWriter(tmp_path / "ref", "m", subject) as first:
        first.add(logits, targets)
        with (
            pytest.raises(OutputError, match="ref is being written by another llmkit process"),
            ReferenceWriter(tmp_path / "ref", "m", subject) as second,
        ):
            second.add(logits, targets)
    with ReferenceWriter(tmp_path / "alone", "m", subject) as alone:
        alone.add(logits, targets)
    assert (tmp_path / "ref").read_bytes() == (tmp_path / "alone").read_bytes()


def test_a_disk_without_room_is_told_in_numbers(pair, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"\(223 tokens of a vocabulary of 380\), the disk has 1 kB free"):
        store(tmp_path / "ref", pair[0])
    assert list(tmp_path.iterdir()) == []


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    assert len(old) == len(new)
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-3], "is truncated"),
        (lambda d: b"some text" * 9, "no safetensors file"),
        (lambda d: b"", "too short"),
        (lambda d: changed(d, b"llmkit.reference/1", b"llmkit.reference/7"), "no reference of llmkit perplexity"),
        (lambda d: changed(d, b'"n_tokens":"227"', b'"n_tokens":"226"'), "are not those of 226 tokens"),
        (lambda d: changed(d, b'"n_tokens":"227"', b'"n_tokens":"9e9"'), "is missing or no number"),
        (lambda d: changed(d, b'"stride":"64"', b'"stride":"99"'), "do not make windows"),
        (lambda d: changed(d, b'"step"', b'"stop"'), "'step' is missing"),
        (lambda d: changed(d, b'"dtype":"F64"', b'"dtype":"I64"'), "nll is I64[223], expected F64[223]"),
    ],
)
def test_what_is_no_reference_is_refused(pair, tmp_path, change, message, capsys):
    path = tmp_path / "ref"
    store(path, pair[0])
    path.write_bytes(change(path.read_bytes()))
    (tmp_path / "t.txt").write_text("text")
    assert main(["perplexity", "/nowhere", "--text", str(tmp_path / "t.txt"), "--reference", str(path)]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert message in error
    assert hint == "hint: name another file for --reference: where none is, this model's distributions are stored"


def test_numbers_that_are_no_probabilities_are_refused(pair, tmp_path):
    path = tmp_path / "ref"
    store(path, pair[0])
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 8] = b"\xff" * 8  # the first of nll
    path.write_bytes(data)
    with pytest.raises(InputError, match="are no probabilities"):
        measure_divergence(read_reference(path), pair[1], IDS, context=64)


def test_the_command_stores_and_compares(tiny_llama, tmp_path, capsys):
    import json

    text, path = tmp_path / "t.txt", tmp_path / "ref"
    text.write_text("Which of these is a fruit? An apple is, and a river is none.\n" * 4)
    call = ["perplexity", str(tiny_llama), "--text", str(text), "--reference", str(path)]
    assert main([*call, "--context", "40", "--stride", "30"]) == 0
    assert f"stored in {path}" in capsys.readouterr().out
    assert main([*call, "--json"]) == 0  # in the windows of the reference
    document = json.loads(capsys.readouterr().out)
    assert (document["context"], document["stride"]) == (40, 30)
    assert document["reference"]["kl_divergence"] < 1e-6
    assert document["reference"]["flipped"] == 0
    assert document["reference"]["perplexity_before"] == document["perplexity"]
    assert main(call) == 0
    assert "95 % interval 1.00000 to 1.00000 (paired)" in capsys.readouterr().out
    assert main([*call, "--stride", "20"]) == 2
    assert "hint: --context 40 --stride 30" in capsys.readouterr().err
    assert main([*call[:-1], str(tmp_path / "none" / "ref")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert module.FORMAT.encode() in path.read_bytes()
