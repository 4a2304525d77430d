"""Tiny llamas as GGUF files whose matrices are random blocks of any type: what only llama.cpp can quantize to."""

from __future__ import annotations

import gguf
import numpy as np
from tiny_graphs import PLUGINS

from llmkit.api import save
from llmkit.decoder.contract import random_checkpoint
from llmkit.formats.gguf_types import TYPE_BY_NAME
from llmkit.transforms.convert.convert import convert

SHAPES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 64, "vocab_size": 96}  # fmt: skip


def blocks(name, shape):
    """Random blocks whose weights are of the size that trained ones have."""
    kind = TYPE_BY_NAME[name]
    n_blocks = shape[1] // kind.block
    rng = np.random.default_rng(kind.code)
    raw = rng.integers(0, 256, (shape[0], n_blocks, kind.nbytes), dtype=np.uint8)
    if name == "MXFP4":
        raw[..., 0] = 120
        return raw.reshape(shape[0], -1)
    # float16 numbers of one sign, so that minima and codes are of one size.
    unit = {"Q2_K": 1 / 40, "Q3_K": 1 / 100, "Q4_K": 1 / 400, "Q5_K": 1 / 800, "Q6_K": 1 / 3000, "IQ4_XS": 1 / 2500}
    step = 0.06 * unit.get(name, 1 / (8 if name in ("Q4_0", "Q4_1") else 16 if name.startswith("Q5") else 128))
    halves = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}.get(name, [0, 2] if name[-1] in "1K" else [0])
    for i, at in enumerate(halves):
        size = step * (-8 if name in ("Q4_1", "Q5_1") and i else 1)
        values = (size * (0.5 + rng.random((*raw.shape[:2], 1)))).astype(np.float16)
        raw[..., at : at + 2] = values.view(np.uint8)
    return raw.reshape(shape[0], -1)


def written(tmp_path, type_of, **changes):
    """A tiny llama as GGUF: every matrix in random blocks of the type that `type_of` names for it."""
    config = PLUGINS["llama"].tiny_config(None) | SHAPES | changes
    save(convert(random_checkpoint(PLUGINS["llama"], config), to="gguf", type="f32"), tmp_path / "f32")
    reader = gguf.GGUFReader(next((tmp_path / "f32").glob("*.gguf")))
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1])
    for tensor in reader.tensors:
        kind = type_of(tensor.name) if len(tensor.shape) == 2 else None
        if kind is None:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            raw = blocks(kind, (int(tensor.shape[1]), int(tensor.shape[0])))
            writer.add_tensor(tensor.name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
