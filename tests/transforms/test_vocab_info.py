"""What a vocabulary holds and what it makes of a text; disagreement of tokenizer and embedding; the commands."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import vocab_world as world
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

import llmkit
from llmkit.cli.app import main
from llmkit.tokenization.agreement import compare_vocabulary
from llmkit.tokenization.bundle import tokenizer_contents
from llmkit.tokenization.scripts import script_of
from llmkit.transforms import vocab


@pytest.fixture
def case(tmp_path):
    base = world.sp_model(world.ENGLISH, 360)
    (tmp_path / "zh.model").write_bytes(world.sp_model(world.CHINESE, 420, model_type="unigram"))
    (tmp_path / "zh.txt").write_text("\n".join(world.CHINESE[:8]))
    n = SentencePieceProcessor(model_proto=base).vocab_size()
    world.model(tmp_path / "m", n, world.sp_files(base), hidden=16)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "script"),
    [("hello", "Latin"), (" the", "Latin"), ("世界", "Han"), ("мир", "Cyrillic"), ("한국", "Hangul"), ("197", "digits"),
     ("...", "punctuation"), ("+", "symbols"), ("  ", "space"), ("", "other"), ("1st", "Latin"), ("かな", "Hiragana")],
)  # fmt: skip
def test_script_is_that_of_the_first_letter(text, script):
    assert script_of(text) == script


def test_counts_are_those_of_sentencepiece(case):
    found = vocab.info(vocab.open_tokenizer(case / "m"), text=case / "zh.txt")
    sp = SentencePieceProcessor(model_file=str(case / "m" / "tokenizer.model"))
    ids = range(sp.vocab_size())
    assert found["n_tokens"] == sp.vocab_size()
    assert found["types"]["byte"] == sum(map(sp.is_byte, ids)) == 256
    assert found["types"]["control"] == sum(map(sp.is_control, ids))
    assert sum(s["n"] for s in found["scripts"].values()) == found["types"]["normal"]
    encoded = [sp.encode(line) for line in world.CHINESE[:8]]
    assert found["text"]["n_chars"] == sum(map(len, world.CHINESE[:8]))
    assert found["text"]["n_tokens"] == sum(map(len, encoded))
    shares = [sp.is_byte(i) for line in encoded for i in line]
    assert found["text"]["byte_fallback_share"] == round(sum(shares) / len(shares), 4)


def test_of_a_byte_level_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(world.byte_level(world.ENGLISH, 380, ["<|end|>"]))
    found = vocab.info(vocab.open_tokenizer(tmp_path / "tokenizer.json"))
    assert (found["kind"], found["n_tokens"]) == ("byte_level", 380)
    assert found["types"] == {"added": 1, "byte": 256, "normal": 123}
    assert found["scripts"]["Latin"]["n"] > 80


def test_the_real_extension_on_chinese(shared, tmp_path):
    folder = shared / "tokenizers"
    lines = []
    for path in sorted((shared / "data" / "ceval").glob("val/*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            lines += [row["question"].replace("\n", " ") for row in csv.DictReader(file)]
    (tmp_path / "zh.txt").write_text("\n".join(lines))
    ckpt = world.model(tmp_path / "m", 32000, {"tokenizer.model": (folder / "llama.model").read_bytes()}, hidden=8)
    out = vocab.extend(ckpt, folder / "chinese_sp.model")
    (tmp_path / "merged.model").write_bytes(out.files["tokenizer.model"].read())
    found = vocab.info(ckpt, text=tmp_path / "zh.txt", against=vocab.open_tokenizer(tmp_path / "merged.model"))
    assert found["scripts"]["Han"]["n"] == 700
    assert (found["against"]["n_tokens"], found["against"]["n_only_there"]) == (49953, 17953)
    before, after = (
        SentencePieceProcessor(model_file=str(f)) for f in (folder / "llama.model", tmp_path / "merged.model")
    )
    assert found["text"]["n_chars"] == sum(map(len, lines))
    assert found["text"]["n_tokens"] == sum(len(before.encode(line)) for line in lines)
    assert found["against"]["text"]["n_tokens"] == sum(len(after.encode(line)) for line in lines)
    assert found["against"]["text"]["n_tokens"] < 0.5 * found["text"]["n_tokens"]


def test_a_disagreement_is_reported_wherever_a_model_is_opened(tmp_path, capsys):
    data = world.sp_model(world.ENGLISH, 360)
    n = SentencePieceProcessor(model_proto=data).vocab_size()
    short = world.model(tmp_path / "short", 100, world.sp_files(data), hidden=16)
    said = f"the tokenizer has {n} tokens, the embedding 100 rows: ids from 100 on have none"
    assert compare_vocabulary(short).warning.startswith(said)
    assert any(w.startswith(said) for w in llmkit.plan(short, tmp_path / "out").warnings)
    assert main(["inspect", str(tmp_path / "short")]) == 0
    assert " ".join(said.split()[:4]) in capsys.readouterr().out
    long = world.model(tmp_path / "long", n + 3, world.sp_files(data), hidden=16)
    assert (
        compare_vocabulary(long).note == f"the embedding has {n + 3} rows for the tokenizer's {n} tokens: 3 are padding"
    )
    assert any("3 are padding" in note for note in llmkit.plan(long, tmp_path / "out").notes)
    same = world.model(tmp_path / "same", n, world.sp_files(data), hidden=16)
    assert compare_vocabulary(same) == type(compare_vocabulary(same))()
    tokenizer = Tokenizer.from_str(world.fast_of(data))
    tokenizer.add_tokens(["[PAD]"])  # an added token that got no row
    more = world.model(tmp_path / "more", n, {"tokenizer.json": tokenizer.to_str()}, hidden=16)
    assert f"has {n + 1} tokens" in compare_vocabulary(more).warning
    (tmp_path / "same" / "tokenizer.json").write_text("nonsense")
    assert "cannot be read" in compare_vocabulary(llmkit.open_checkpoint(tmp_path / "same")).warning


def test_commands(case, capsys):
    assert (
        main(
            ["vocab", "extend", str(case / "m"), "--with", str(case / "zh.model"), "-o", str(case / "out"), "--dry-run"]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert "new tokens at ids" in shown.out
    assert not (case / "out").exists()
    args = ["vocab", "extend", str(case / "m"), "--with", str(case / "zh.model"), "--init", "pieces", "-o"]
    assert main([*args, str(case / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recipe"][-1]["transform"] == "vocab.extend"
    assert (
        main(
            ["vocab", "info", str(case / "m"), "--text", str(case / "zh.txt"), "--against", str(case / "out"), "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["against"]["tokens_ratio"] < 0.5
    assert main(["vocab", "info", str(case / "m"), "--text", str(case / "zh.txt"), "--against", str(case / "out")]) == 0
    assert "tokens per character" in capsys.readouterr().out
    assert main(["vocab", "trim", str(case / "out"), "--corpus", str(case / "zh.txt"), "-o", str(case / "small")]) == 0
    capsys.readouterr()
    assert main(["vocab", "info", str(case / "small"), "-q"]) == 0
    n_small = int(capsys.readouterr().out)
    assert n_small < document["recipe"][-1]["tokens"]
    assert llmkit.open_checkpoint(case / "small").config["vocab_size"] == n_small
    assert main([*args, str(case / "out")]) == 2
    assert main(["vocab", "extend", str(case / "m"), "--with", str(case / "nope"), "-o", str(case / "x")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (case / "x").exists()


def test_the_tokenizer_beside_a_weight_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert list(tokenizer_contents(tmp_path / "model.safetensors")) == ["tokenizer.json"]
