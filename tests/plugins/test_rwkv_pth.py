"""Files in the spelling of a family's own code: RWKV's .pth, by the names of transformers' conversion script."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from goldens import GOLDEN, error, golden

import llmkit.api
from llmkit.architecture.registry import default_registry
from llmkit.calibration.blocks import Blocks
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.load import load_blocks
from llmkit.errors import InputError, RequirementError
from llmkit.transforms.convert import convert

RWKV = next(default_registry().load(p) for p in default_registry().plugins if p.name == "rwkv")


def published(name):
    """convert_rwkv_checkpoint_to_hf.py backwards."""
    name = name.removeprefix("rwkv.").replace("embeddings.", "emb.").replace("blocks.0.pre_ln", "blocks.0.ln0")
    name = name.replace(".attention.", ".att.").replace(".feed_forward.", ".ffn.")
    for long in ("key", "value", "receptance"):
        name = name.replace(f"time_mix_{long}", f"time_mix_{long[0]}")
    return name


@pytest.fixture
def model(tmp_path):
    ckpt = random_checkpoint(RWKV, RWKV.tiny_config() | {"num_hidden_layers": 3, "intermediate_size": 96})
    path = tmp_path / "RWKV-4-Pile-tiny.pth"
    torch.save({published(n): t.load() for n, t in ckpt.tensors.items()}, path)
    return path, ckpt


def test_a_pth_is_read_without_a_config(model, tmp_path):
    path, ckpt = model
    names = {published(n) for n in ckpt.tensors}
    assert {
        "emb.weight",
        "blocks.0.ln0.bias",
        "blocks.2.att.time_mix_r",
        "blocks.1.ffn.time_mix_k",
        "head.weight",
    } <= names
    opened = open_checkpoint(path)
    assert opened.layout == "RWKV .pth"
    assert sorted(opened.tensors) == sorted(ckpt.tensors)
    assert all(torch.equal(opened.tensors[n].load(), t.load()) for n, t in ckpt.tensors.items())
    llmkit.api.save(convert(opened, to="hf"), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = theirs(ids).logits
    found = load_decoder(opened)(ids)
    assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


def test_version_5_0_is_refused(model):
    path, _ = model
    weights = torch.load(path, weights_only=True)
    weights["blocks.0.att.time_decay"] = torch.zeros(4, 8)
    torch.save(weights, path)
    with pytest.raises(InputError, match=r"an RWKV of version 5\.0 or 5\.1, which no plugin describes"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["rwkv5-eagle", "rwkv6-finch"])
def test_versions_5_2_and_6_give_what_their_own_code_gave(name, tmp_path):
    ckpt, ids, wanted = golden(name)
    path = tmp_path / "RWKV-tiny.pth"
    torch.save({published_5(n): lazy.load() for n, lazy in ckpt.tensors.items()}, path)
    opened = open_checkpoint(path)
    assert sorted(opened.tensors) == sorted(ckpt.tensors)
    assert {k: v for k, v in opened.config.items() if k != "torch_dtype"} == ckpt.config
    decoder = load_decoder(opened)
    assert error(decoder(ids), wanted) <= 1e-5
    stepwise, cache = torch.from_numpy(np.load(GOLDEN / name / "expected.npz")["stepwise"]), decoder.new_cache()
    found = torch.cat([decoder(ids[:, i : i + 1], cache) for i in range(ids.shape[1])], 1)
    assert error(found, stepwise) <= 1e-5


def test_a_missing_tensor_is_named(model):
    path, _ = model
    weights = torch.load(path, weights_only=True)
    del weights["blocks.1.ffn.value.weight"]
    torch.save(weights, path)
    with pytest.raises(InputError, match=r"1 tensor missing: blocks\.1\.ffn\.value\.weight"):
        open_checkpoint(path)


def test_version_7_gives_what_its_own_code_gave(tmp_path):
    ckpt, ids, wanted = golden("rwkv7-goose")
    path = tmp_path / "RWKV-x070-tiny.pth"
    torch.save(published_7({name: lazy.load() for name, lazy in ckpt.tensors.items()}), path)
    opened = open_checkpoint(path)
    assert sorted(opened.tensors) == sorted(ckpt.tensors)
    assert {k: v for k, v in opened.config.items() if k != "torch_dtype"} == ckpt.config
    assert error(load_decoder(opened)(ids), wanted) <= 1e-5


def test_layers_of_version_7_are_not_computed_one_by_one():
    with pytest.raises(RequirementError, match="all take the values of the first"):
        Blocks(*load_blocks(golden("rwkv7-goose")[0]), torch.arange(5)[None])


def published_5(name):
    """The names of BlinkDL's RWKV-5.2 and RWKV-6."""
    return published(name).replace("time_mix_gate", "time_mix_g")


def published_7(tensors):
    """The names and shapes of BlinkDL/RWKV-LM's RWKV-7 (x070)."""
    found = {f"blocks.0.att.v{i}": torch.zeros(1, 1, 32) for i in range(3)}
    longer = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "g_norm": "ln_x",
              "attn_norm": "ln1", "ffn_norm": "ln2", "pre_norm": "ln0"}  # fmt: skip
    for name, tensor in tensors.items():
        name = name.removeprefix("model.").replace("layers.", "blocks.").replace(".attn.", ".att.")
        name = name.replace("embeddings.", "emb.").replace("lm_head.", "head.")
        name = name.replace("norm.", "ln_out.") if name.startswith("norm.") else name
        stem, _, last = name.partition("_lora.lora.")
        if last:
            name = stem + {"0.weight": "1", "2.weight": "2", "2.bias": "0"}[last]
            tensor = tensor.T.contiguous() if tensor.dim() == 2 else tensor.view(1, 1, -1)
        elif name.endswith((".k_k", ".k_a", "ffn.x_k")):
            tensor = tensor.view(1, 1, -1)
        for short, long in longer.items():
            name = name.replace(f".{short}.", f".{long}.")
        found[name] = tensor
    return found
