"""What cannot be done with a family is refused on the command line in one line, and leaves nothing behind."""

from __future__ import annotations

from llmkit.api import save
from llmkit.architecture.registry import default_registry
from llmkit.decoder.contract import random_checkpoint


def test_transposed_layers_are_not_quantized(tmp_path, call):
    plugin = next(p for p in default_registry().plugins if p.name == "gpt2")
    architecture = default_registry().load(plugin)
    save(random_checkpoint(architecture, architecture.tiny_config()), tmp_path / "m")
    found = call("quantize", tmp_path / "m", "--bits", "8", "-o", tmp_path / "out")
    assert found.code == 2
    assert found.out == ""
    error, hint = found.err.strip().splitlines()[-2:]
    assert error == (
        "error: m: transformer.h.0.attn.c_attn.weight and 7 more are stored as [in, out] (the Conv1D layers of "
        "transformers); compressed-tensors describes [out, in] only, and transformers would put random weights in "
        "their place"
    )
    assert hint == (
        "hint: --format gptq or bitsandbytes (convert: --to), whose loaders make linear layers of them; or a float "
        "dtype of half the size: llmkit convert MODEL --to hf --dtype bfloat16 -o OUT"
    )
    assert not list(tmp_path.glob("out*"))
    converted = call("convert", tmp_path / "m", "--to", "hf", "--dtype", "bfloat16", "-o", tmp_path / "half", "-q")
    assert converted.code == 0
