"""Models of ChatGLM and Baichuan whose layers are quantized as their own code does it, computed as with those floats.

The integers are made here by the formulas of the originals, in numpy: `quantization.py` of chatglm-6b
(scale = max |row| / (2^(bits-1) - 1), an even column in the high half of a byte) and `quantizer.py` of
Baichuan-13B-Chat (eight columns in a word, the first lowest; int8 transposed).
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized, describe
from llmkit.decoder import load_decoder
from llmkit.errors import SpecError
from llmkit.tensors.lazy import Context
from tests.goldens import golden

LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "W_pack", "_proj")


def rounded(weight, bits):
    """Integers [out, in], and scales [out]."""
    scales = np.abs(weight).max(1) / (2 ** (bits - 1) - 1)
    return np.round(weight / scales[:, None]).astype(np.int64), scales


def chatglm(q, bits):
    if bits == 8:
        return q.astype(np.int8)
    return (((q[:, 0::2] & 15) << 4) | (q[:, 1::2] & 15)).astype(np.uint8).view(np.int8)


def baichuan(q, bits):
    if bits == 8:
        return np.ascontiguousarray(q.T).astype(np.int8)
    words = np.zeros((len(q), q.shape[1] // 8), np.uint32)
    for j in range(8):
        words |= (q[:, j::8] & 15).astype(np.uint32) << np.uint32(4 * j)
    return words.view(np.int32)


@pytest.fixture
def folder(tmp_path):
    def make(name, bits, **config):
        """A recorded model with quantized layers, and the floats that its integers stand for."""
        ckpt, ids, _ = golden(name)
        pack, scale = (chatglm, "weight_scale") if "chatglm" in name else (baichuan, "scale")
        stored, floats = {}, {}
        for key, lazy in ckpt.tensors.items():
            floats[key] = stored[key] = lazy.load()
            stem = key.removesuffix(".weight")
            if stem != key and stem.endswith(LAYERS) and lazy.shape[1] % 8 == 0:
                q, scales = rounded(floats[key].numpy(), bits)
                scales = scales.astype(np.float32)
                stored[key], stored[f"{stem}.{scale}"] = torch.tensor(pack(q, bits)), torch.tensor(scales)
                floats[key] = torch.tensor(q.astype(np.float32) * scales[:, None])
        for where, tensors, more in ((tmp_path / "q", stored, config), (tmp_path / "f", floats, {})):
            where.mkdir()
            save_file({k: v.contiguous() for k, v in tensors.items()}, where / "model.safetensors", {"format": "pt"})
            (where / "config.json").write_text(json.dumps({**ckpt.config, **more}))
        return open_checkpoint(tmp_path / "q"), open_checkpoint(tmp_path / "f"), ids

    return make


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "baichuan-7b", "baichuan-13b"])
def test_logits_are_those_of_the_floats(folder, name, bits):
    config = {"quantization_bit": bits} if "chatglm" in name else {}
    made, floats, ids = folder(name, bits, **config)
    assert describe(made) == f"int{bits} per channel symmetric, {'chatglm' if 'chatglm' in name else 'baichuan'}"
    restored = dequantized(made)
    assert restored.config.get("quantization_bit", 0) == 0
    for key, lazy in floats.tensors.items():
        whole = restored[key].load()
        assert torch.equal(whole, lazy.load()), key
        n = len(whole)
        assert torch.equal(
            torch.cat([Context().rows(restored[key], (0, 3)), Context().rows(restored[key], (3, n))]), whole
        )
    assert torch.equal(load_decoder(made)(ids), load_decoder(floats)(ids))


def test_bits_of_a_model_that_nothing_describes(tmp_path):
    save_file(
        {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(4)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(SpecError, match=r"a\.weight: nothing tells whether I8\[4, 8\] are codes of 4 or of 8 bits"):
        dequantized(open_checkpoint(tmp_path / "x.safetensors"))


def test_scales_of_another_number_of_rows(tmp_path):
    tensors = {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_bit": 8}))
    with pytest.raises(SpecError, match=r"a\.weight: int8 I8\[4, 8\] and weight_scale F32\[5\] do not make a weight"):
        dequantized(open_checkpoint(tmp_path))
