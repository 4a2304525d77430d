"""Every command and every line of Python that the README shows is run, on small stand-ins under the names it uses."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.cli.app import main
from llmkit.decoder.contract import random_checkpoint
from llmkit.transforms import delta

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ANSWER_MAY_BE_NO = ("diff", "--fail-under")


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section."""
    found = re.search(rf"^## {section}\n(.*?)(?=^## )", README, re.M | re.S)
    assert found is not None, section
    return re.findall(rf"^```{language}\n(.*?)^```", found[1], re.M | re.S)


def commands(section: str) -> list[list[str]]:
    """The `llmkit` calls of a section, without what they are called with in the shell."""
    lines = [line for block in blocks(section, "bash") for line in block.splitlines()]
    assert lines, section
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model for each name in the README: the mini model stands in."""
    folder = tmp_path_factory.mktemp("readme")
    mini = Path(str(files("llmkit_evalsets"))) / "mini"
    names = {"base": ["llama-7b", "SmolLM2-135M"], "delta": ["vicuna-7b-delta-v1.1"]}
    names["adapter"] = ["math-lora", "code-lora", "my-lora", "alpaca-lora-7b"]
    names["adapter"] += ["chinese-llama-plus-lora-7b", "chinese-alpaca-plus-lora-7b"]
    for source, targets in names.items():
        for target in targets:
            shutil.copytree(mini / source, folder / target)
    base, change = (llmkit.open_checkpoint(folder / n) for n in ("llama-7b", "vicuna-7b-delta-v1.1"))
    llmkit.save(delta.apply(base, change), folder / "my-tuned-7b")
    for name in ("wiki.txt", "my.txt"):
        (folder / name).write_text((mini / "text.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    chatglm = next(default_registry().load(p) for p in default_registry().plugins if p.name == "chatglm2")
    llmkit.save(random_checkpoint(chatglm, chatglm.tiny_config()), folder / "chatglm3-6b")
    coded_releases(folder)
    talk = [{"role": r, "content": c} for r, c in (("user", "Who?"), ("assistant", "I."), ("user", "And you?"))]
    (folder / "talk.json").write_text(json.dumps(talk), encoding="utf-8")
    questions = [[f"What is {i}?", "one", "two", "three", "four", "ABCD"[i % 4]] for i in range(8)]
    for part in ("dev", "test", "val"):
        for bench in ("mmlu", "ceval"):
            (folder / bench / part).mkdir(parents=True)
        write(folder / "mmlu" / part / f"anatomy_{part}.csv", questions)
        for subject in ("law", "accountant"):
            rows = [["id", "question", "A", "B", "C", "D", "answer", "explanation"]]
            rows += [[str(i), *row, ""] for i, row in enumerate(questions)]
            write(folder / "ceval" / part / f"{subject}_{part}.csv", rows)
    return folder


def coded_releases(folder: Path) -> None:
    """An XOR release and an encrypted one, made of small models."""
    sys.path.insert(0, str(ROOT / "tests" / "releases"))
    import release_world as world

    tuned = world.write_hf(folder / "tuned-hf", tuned=1)
    world.write_xor_payload(
        folder / "pygmalion-7b" / "xor_encoded_files", world.write_hf(folder / "llama-7b-hf"), tuned
    )
    (folder / "7B").mkdir()
    key = world.write_key(folder / "7B" / "consolidated.00.pth")
    world.write_encrypted(folder / "BELLE-7B-enc", tuned, key)


def write(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def run(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args in commands(section):
        if "-o" in args and "--dry-run" not in args:
            shutil.rmtree(args[args.index("-o") + 1], ignore_errors=True)
        code = main(args)
        allowed = {0, 1} if any(word in args for word in ANSWER_MAY_BE_NO) else {0}
        assert code in allowed, (args, capsys.readouterr().err)


def test_what_is_shown_of_the_tool_works(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    shown = ["Deltas", "Adapters", "Layouts", "Quantization", "ONNX", "Evaluation", "Prompts and tokenizers", "Look"]
    for section in shown:
        run(section, capsys)


def test_what_is_shown_of_vocabularies_works(home, tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "tests" / "transforms"))
    import vocab_world as world
    from sentencepiece import SentencePieceProcessor

    base = world.sp_model(world.ENGLISH, 360)
    n = SentencePieceProcessor(model_proto=base).vocab_size()
    world.model(tmp_path / "llama-7b", n, world.sp_files(base), hidden=16)
    (tmp_path / "chinese_sp.model").write_bytes(world.sp_model(world.CHINESE, 420, model_type="unigram"))
    (tmp_path / "chinese.txt").write_text("\n".join(world.CHINESE), encoding="utf-8")
    for name in ("SmolLM2-135M", "my.txt"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    run("Vocabularies", capsys)


def test_the_python_shown_works(home, monkeypatch, capsys):
    import torch

    monkeypatch.chdir(home)
    shutil.rmtree("out", ignore_errors=True)
    (block,) = blocks("Python", "python")
    scope = {"input_ids": torch.arange(12).view(2, 6)}
    exec(compile(block, "README.md", "exec"), scope)  # the README is ours
    assert scope["logits"].shape == (2, 6, 1536)
    assert Path("out/llmkit.json").is_file()


def test_the_prompt_formats_are_listed():
    from llmkit.architecture.prompts import FORMATS

    section = re.search(r"^## Prompts and tokenizers\n(.*?)(?=^## )", README, re.M | re.S)[1]
    listed = set(re.findall(r"[a-z0-9-]+", section[section.index("name one:") : section.index("Special tokens")]))
    assert listed >= set(FORMATS) - {"raw", "chat-template"}
