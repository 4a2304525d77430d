"""Exported folders in ONNX Runtime GenAI, held to the torch decoder."""

from __future__ import annotations

import pytest
from runtimes import (
    FAMILIES,
    N_TOKENS,
    ONE_THREAD,
    PROMPTS,
    UNUSUAL,
    end_and_pad,
    expected,
    exported,
    exported_gguf,
    exported_mini,
    written_by_llmkit,
)

pytestmark = pytest.mark.genai
genai = pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI (extra genai)")
END = 2  # GenAI ends a text with it, as genai_config.json says


@pytest.fixture(scope="module", params=[*FAMILIES, *UNUSUAL])
def folder(request, tmp_path_factory):
    return exported(request.param, tmp_path_factory.mktemp("genai"))


def test_greedy_text(folder):
    _check(folder, expected(folder), END)


@pytest.mark.parametrize(
    "options", [("--kv-cache-dtype", "int8"), ("--bits", "4"), ("--bits", "8"), ("--bits", "4", "--attention", "flash")]
)
def test_integers(options, tmp_path):
    folder = exported_mini(tmp_path, *options)
    _check(folder, written_by_llmkit(folder), end_and_pad(folder)[0])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_kept_blocks_of_a_gguf_file(kind, tmp_path):
    folder = exported_gguf(tmp_path, kind)
    _check(folder, written_by_llmkit(folder), end_and_pad(folder)[0])


def _check(folder, expected, end):
    config = genai.Config(str(folder))
    config.overlay(ONE_THREAD)
    model = genai.Model(config)
    found = []
    for prompt in PROMPTS:
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(prompt) + N_TOKENS)
        generator = genai.Generator(model, options)
        generator.append_tokens(prompt)
        text = []
        while not generator.is_done():
            generator.generate_next_token()
            text.append(int(generator.get_next_tokens()[0]))
        found.append(text)
    whole = [[*text, end] for text in expected]
    wanted = [text[: min(text.index(end) + 1, N_TOKENS)] for text in whole]
    assert found == wanted
    assert max(map(len, wanted)) > N_TOKENS // 2
