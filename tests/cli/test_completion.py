"""What a shell offers for a word that was begun, asked as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer
from typer._completion_classes import BashComplete

from llmkit.cli.app import app

COMMAND = typer.main.get_command(app)


def offered(*words: str) -> list[str]:
    """What completes the last word."""
    shell = BashComplete(COMMAND, {}, "llmkit", "_LLMKIT_COMPLETE")
    return [item.value for item in shell.get_completions([*words[:-1]], words[-1])]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eval", "M", "--bench", "m"], ["mini", "mmlu", "mmlu_pro"]),
        (["eval", "M", "--bench", "mini,ce"], ["mini,ceval"]),
        (["eval", "M", "--chat-template", "vicuna"], ["vicuna", "vicuna-v0"]),
        (["convert", "M", "--to", "l"], ["litgpt", "llama2c"]),
        (["convert", "M", "--to", "gp"], ["gptq", "gptq_v2"]),
        (["convert", "M", "--type", "q8"], ["q8_0"]),
        (["convert", "M", "--dtype", "b"], ["bfloat16"]),
        (["convert", "M", "--as", "ll"], ["llama", "llama4"]),
        (["perplexity", "M", "--dtype", ""], ["float32", "float16", "bfloat16"]),
        (["perplexity", "M", "--backend", "tr"], ["transformers"]),
        (["perplexity", "M", "--backend", "v"], []),
        (["eval", "M", "--backend", "v"], ["vllm"]),
        (["generate", "M", "--provider", ""], ["cpu", "cuda"]),
        (["generate", "M", "--device", "c"], ["cpu", "cuda"]),
        (["export", "M", "--attention", ""], ["gqa", "flash", "attention", "mha"]),
        (["export", "M", "--kv-cache-dtype", ""], ["int8"]),
        (["quantize", "M", "--bits", ""], ["8", "4", "3", "2"]),
        (["quantize", "M", "--method", "r"], ["rtn"]),
        (["quantize", "M", "--format", "comp"], ["compressed-tensors"]),
        (["lora", "combine", "A", "--method", "dare"], ["dare_linear", "dare_ties"]),
        (["delta", "apply", "B", "D", "--profile", "alp"], ["alpaca", "alpaca-farm"]),
        (["vocab", "extend", "M", "--init", "f"], ["focus"]),
        (["plugins", "show", "lla"], ["llama", "llama4"]),
        (["plugins", "check", "lla"], ["llama", "llama4"]),
        (["conv"], ["convert"]),
    ],
)
def test_the_values_of_an_option_are_offered(words, expected):
    assert sorted(offered(*words)) == sorted(expected)


def test_names_that_depend_on_what_was_written_before(call, tiny, tmp_path):
    assert offered("eval", "M", "--bench", "ceval", "--subjects", "law,hard") == ["law,hard"]
    assert offered("eval", "M", "--bench", "mmlu", "--subjects", "astro") == ["astronomy"]
    assert offered("eval", "M", "--bench", "none", "--subjects", "a") == offered("eval", "M", "--subjects", "a") == []
    name = "model.layers.1.self_attn.k_proj"
    for option in ("--only", "--keep"):
        assert offered("quantize", str(tiny), option, "model.layers.1.self_attn.k") == [name]
        assert offered("quantize", str(tmp_path / "none"), option, "m") == []
    assert call("quantize", tiny, "--bits", "8", "-o", tmp_path / "out").code == 0
    assert offered("explain", str(tmp_path / "out"), f"{name}.weight_sc") == [f"{name}.weight_scale"]
    assert offered("explain", str(tiny), "m") == []


@pytest.mark.parametrize("words", [["inspect", "vic"], ["eval", "M", "--data", ""], ["convert", "M", "-o", ""]])
def test_a_path_is_left_to_the_shell(words):
    assert offered(*words) == []


def test_the_program_answers_bash():
    asked = {"COMP_WORDS": "llmkit eval M --bench c", "COMP_CWORD": "4", "_LLMKIT_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "llmkit"], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["ceval", "cmmlu"]
