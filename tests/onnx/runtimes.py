"""What the tests of other runtimes run: tiny models exported by llmkit, and the texts that the torch decoder gives."""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.generate import generate

PROMPTS = [[5, 17, 40, 9, 33, 21, 60, 12, 8], [71, 6, 30], [44, 45, 46, 11, 80, 7]]
N_TOKENS = 24
# Optimum knows only heads of hidden / heads dims, and asks transformers for the number of key heads. The last three
# were published with code of their own: their config.json is made for it.
FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "bloom", "opt", "chatglm2", "baichuan", "baichuan13b")


def exported(name: str, folder: Path) -> Path:
    """A tiny random model of a family as an ONNX folder; heads of 8 dims, as GroupQueryAttention wants them."""
    from safetensors.torch import save_file

    from llmkit.cli.app import main

    registry = default_registry()
    architecture = registry.load(next(p for p in registry.plugins if p.name == name))
    config = architecture.tiny_config() | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    ckpt = random_checkpoint(architecture, config)
    source = folder / name
    source.mkdir()
    save_file({n: t.load().contiguous() for n, t in ckpt.tensors.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    out = folder / f"{name}-onnx"
    assert main(["export", str(source), "--to", "onnx", "--no-check", "-q", "-o", str(out)]) == 0
    return out


def exported_int8(folder: Path) -> Path:
    """The trained model of the mini bench as an ONNX folder whose cache is in int8."""
    from llmkit.cli.app import main

    source = Path(__file__).resolve().parents[2] / "evalsets" / "mini" / "base"
    options = ["--kv-cache-dtype", "int8", "--no-check", "-q", "-o", str(folder / "mini-onnx")]
    assert main(["export", str(source), "--to", "onnx", *options]) == 0
    return folder / "mini-onnx"


def written_by_llmkit(folder: Path) -> list[list[int]]:
    """What llmkit's own runner writes after each prompt, greedily: alone, without padding."""
    from llmkit.onnx.opening import load_onnx

    decoder = load_onnx(folder)
    return [generate(decoder, [prompt], max_new_tokens=N_TOKENS)[0] for prompt in PROMPTS]


def expected(folder: Path) -> list[list[int]]:
    """What the torch decoder writes after each prompt, greedily, no end token: of the folder that was exported."""
    source = folder.with_name(folder.name.removesuffix("-onnx"))
    return generate(load_decoder(open_checkpoint(source)), PROMPTS, max_new_tokens=N_TOKENS)
