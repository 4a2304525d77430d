"""What transformers writes after prompts for SmolLM2, recorded: the same for all runtimes that are held to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "smollm2" / "texts.json").read_text())


@pytest.fixture(scope="session")
def prompts():
    """Token ids: plain text, code, a chat, and one prompt of more than 512 tokens."""
    assert max(map(len, RECORDED["prompts"])) > 512
    return RECORDED["prompts"]


@pytest.fixture(scope="session")
def texts():
    """The first 16 of the 32 tokens recorded after each prompt."""
    assert {len(text) for text in RECORDED["texts"]} == {32}
    return [text[:16] for text in RECORDED["texts"]]
