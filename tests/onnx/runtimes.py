"""What the tests of other runtimes run: tiny models exported by llmkit, and the texts that the torch decoder gives."""

from __future__ import annotations

import json
from pathlib import Path

from rotation import EVERY_WAY

from llmkit.architecture.architecture import Architecture
from llmkit.architecture.hooks import FeedsGraph
from llmkit.architecture.kinds import Block, GroupedQuery
from llmkit.architecture.layer_inputs import SharedKeys
from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.generate import generate

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 17, 40, 9, 33, 21, 60, 12, 8], [71, 6, 30], [44, 45, 46, 11, 80, 7]]
N_TOKENS, PAD = 16, 0
# Threads of ONNX Runtime wait awake, and tests already run one process a core. For GenAI's configuration:
ONE_THREAD = json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}})
ARCHITECTURES = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}


def _is_fed(architecture: Architecture) -> bool:
    """Whether its graph needs nothing that only llmkit feeds: places in a prompt, states, compressed keys.

    Other programs believe the keys of all layers to have one size.
    """
    model = architecture.bind(architecture.tiny_config())
    is_usual = all(
        isinstance(block, Block)
        and isinstance(block.attention, GroupedQuery)
        and not isinstance(block.attention, SharedKeys)
        and not isinstance(block.position, FeedsGraph)
        for block in model.blocks
    )
    return is_usual and len({block.attention.head_sizes(model.dims) for block in model.blocks}) == 1


_FED = [name for name, architecture in ARCHITECTURES.items() if _is_fed(architecture)]
FAMILIES = tuple(name for i, name in enumerate(_FED) if name in EVERY_WAY or i % 3 == 0)  # each takes a second or two
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


def one_thread():
    """The same as options of a session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


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

    decoder = load_onnx(folder, threads=1)
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
