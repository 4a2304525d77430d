"""What transformers writes after prompts for SmolLM2: computed once for all runtimes that are held to it."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def prompts(smollm2):
    from runtimes import real_prompts

    found = real_prompts(smollm2)
    assert max(map(len, found)) > 512
    return found


@pytest.fixture(scope="session")
def texts(smollm2, prompts):
    """64 tokens after each prompt."""
    from runtimes import transformers_texts

    return transformers_texts(smollm2, prompts, 64)
