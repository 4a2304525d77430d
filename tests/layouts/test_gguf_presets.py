"""The types that llama.cpp's own quantizer gives the matrices of some models (recorded: tests/golden/gguf)."""

from __future__ import annotations

import json

import gguf
import pytest

from llmkit.layouts.gguf_presets import PRESETS, types_of
from llmkit.layouts.gguf_weights import to_gguf
from llmkit.transforms.convert.gguf import sizes_of
from tests.golden.gguf.record import HERE, MODELS, compact, model

RECORDED = json.loads((HERE / "presets.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_presets_are_those_of_llama_cpp(name):
    from llmkit.architecture.registry import require

    ckpt = model(name)
    family = require(ckpt.config, "m").gguf
    shapes = {n: lazy.shape for n, lazy in to_gguf(ckpt.tensors, ckpt.require_model(), family).items()}
    for case, recorded in RECORDED[name].items():
        preset, _, imatrix = case.partition(" ")
        ways = [True] if imatrix and preset in RECORDED[name] else [bool(imatrix)] if not imatrix else [True, False]
        for has_statistics in ways:
            sizes = sizes_of(ckpt.require_model(), family, has_statistics=has_statistics)
            types, wanted = types_of(PRESETS[preset], shapes, sizes)
            found = {n: kind for n, kind in types.items() if len(shapes[n]) > 1}
            assert compact(found) == recorded, case
            assert all(shapes[n][-1] % 256 for n in wanted)


def test_file_types_are_those_of_the_library():
    stated = {int(f): f.name.split("_", 1)[1] for f in gguf.LlamaFileType if "_" in f.name}
    assert {mix.file_type: name for name, mix in PRESETS.items()}.items() <= stated.items()


def test_every_preset_that_is_written_was_recorded():
    assert {case.split()[0] for case in RECORDED["grouped"]} | {"F32", "BF16"} == set(PRESETS)
