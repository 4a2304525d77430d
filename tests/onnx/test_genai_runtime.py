"""Exported folders in ONNX Runtime GenAI, held to the torch decoder."""

from __future__ import annotations

import json

import pytest
from runtimes import FAMILIES, N_TOKENS, PROMPTS, expected, exported, exported_int8, written_by_llmkit

pytestmark = pytest.mark.genai
genai = pytest.importorskip("onnxruntime_genai", reason="needs ONNX Runtime GenAI (extra genai)")
END = 2  # GenAI ends a text with it, as genai_config.json says


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return exported(request.param, tmp_path_factory.mktemp("genai"))


def test_greedy_text(folder):
    _check(folder, expected(folder), END)


def test_a_cache_in_int8(tmp_path):
    folder = exported_int8(tmp_path)
    end = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    _check(folder, written_by_llmkit(folder), end)


def _check(folder, expected, end):
    model = genai.Model(str(folder))
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
