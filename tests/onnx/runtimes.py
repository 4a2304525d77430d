"""What the tests of other runtimes run: tiny models exported by llmkit, and the texts that the torch decoder gives."""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.generate import generate

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 17, 40, 9, 33, 21, 60, 12, 8], [71, 6, 30], [44, 45, 46, 11, 80, 7]]
N_TOKENS, PAD = 24, 0
# Those whose graphs need nothing that only llmkit feeds: the places in a ChatGLM-6B prompt, the state of RWKV.
FAMILIES = tuple(p.name for p in default_registry().plugins if p.is_builtin and p.name not in ("chatglm", "rwkv"))
# Sizes and spellings that a runtime could stumble over: heads of other than hidden / heads dims, key heads in a type
# that Optimum believes to have none, and a model_type that transformers does not know.
UNUSUAL = {
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "mistral, narrow heads": ("mistral", {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "phi3, key heads": ("phi3", {"num_key_value_heads": 2}),
    "falcon of 2023": ("falcon", "7b-2023"),
    "falcon-40b of 2023": ("falcon40b", "40b-2023"),
}


def exported(name: str, folder: Path, *options: str) -> Path:
    """A tiny random model of a family (or `UNUSUAL`) as an ONNX folder; heads of 8 dims or more, as GQA wants them."""
    from safetensors.torch import save_file

    from llmkit.cli.app import main

    registry = default_registry()
    family, change = UNUSUAL.get(name, (name, {}))
    architecture = registry.load(next(p for p in registry.plugins if p.name == family))
    variant, changes = (change, {}) if isinstance(change, str) else (None, change)
    config = architecture.tiny_config(variant) | changes
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    ckpt = random_checkpoint(architecture, config)
    source = folder / name
    source.mkdir()
    save_file({n: t.load().contiguous() for n, t in ckpt.tensors.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    out = folder / f"{name}-onnx"
    assert main(["export", str(source), "--to", "onnx", "--no-check", "-q", *options, "-o", str(out)]) == 0
    return out


def exported_mini(folder: Path, *options: str) -> Path:
    """The trained model of the mini bench as an ONNX folder."""
    from llmkit.cli.app import main

    source, out = ROOT / "evalsets" / "mini" / "base", folder / "mini-onnx"
    assert main(["export", str(source), "--to", "onnx", *options, "--no-check", "-q", "-o", str(out)]) == 0
    return out


def exported_gguf(folder: Path, kind: str, *options: str) -> Path:
    """A tiny random llama whose matrices are blocks of a GGUF file's type, which the graph keeps."""
    from gguf_models import written

    from llmkit.cli.app import main

    path, out = written(folder, lambda name: kind), folder / "gguf-onnx"
    assert main(["export", str(path), "--to", "onnx", *options, "--no-check", "-q", "-o", str(out)]) == 0
    return out


def written_by_llmkit(folder: Path, prompts: list[list[int]] = PROMPTS, n_tokens: int = N_TOKENS) -> list[list[int]]:
    """What llmkit's own runner writes after each prompt, greedily: alone, without padding."""
    from llmkit.onnx.opening import load_onnx

    decoder = load_onnx(folder)
    return [generate(decoder, [prompt], max_new_tokens=n_tokens)[0] for prompt in prompts]


def end_and_pad(folder: Path) -> tuple[int, int]:
    """The end token that ONNX Runtime GenAI stops at, and the one that it takes for padding."""
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    ends = model["eos_token_id"]
    return ends if isinstance(ends, int) else ends[0], model["pad_token_id"]


def expected(folder: Path) -> list[list[int]]:
    """What the torch decoder writes after each prompt, greedily, no end token: of the folder that was exported."""
    return generate(load_decoder(open_checkpoint(source_of(folder))), PROMPTS, max_new_tokens=N_TOKENS)


def source_of(folder: Path) -> Path:
    """The checkpoint that a folder was exported from."""
    return folder.with_name(folder.name.removesuffix("-onnx"))


def left_padded(prompts: list[list[int]], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of one length, and their mask."""
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(p)) + p for p in prompts]
    return rows, [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]


def real_prompts(source: Path) -> list[list[int]]:
    """Token ids of prompts for SmolLM2: plain text, code, a chat, and one of more than 512 tokens."""
    from tokenizers import Tokenizer  # transformers 4 does not read what transformers 5 saved beside it

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    chat = "<|im_start|>user\nWhy is the sky blue at noon, and red at dusk?<|im_end|>\n<|im_start|>assistant\n"
    texts = ("The history of the city of Lisbon begins", "def fibonacci(n):\n    ", chat)
    long = tokenizer.encode((ROOT / "evalsets/mini/text.txt").read_text()).ids[:700]
    return [*(tokenizer.encode(text).ids for text in texts), long]


def transformers_texts(source: Path, prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
    """What transformers writes after each prompt in float32, greedily and past any end token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    # As transformers 5 saves it; 4 would take its default.
    stated = json.loads((source / "config.json").read_text()).get("rope_parameters") or {}
    config.rope_theta = stated.get("rope_theta", getattr(config, "rope_theta", None))
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False)
        texts.append(found[0, len(prompt) :].tolist())
    assert all(len(text) == n_tokens for text in texts)
    return texts
