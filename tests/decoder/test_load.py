"""Opening a decoder from Python."""

from __future__ import annotations

import pytest

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.decoder.contract import random_checkpoint


def test_keys_that_no_kind_reads_are_python_warnings():
    architecture = default_registry().load(next(p for p in default_registry().plugins if p.name == "llama"))
    ckpt = random_checkpoint(architecture, architecture.tiny_config())
    with pytest.warns(UserWarning, match="does not read logits_scaling"):
        llmkit.load_decoder(ckpt.derive(config={**ckpt.config, "logits_scaling": 3.0}))
