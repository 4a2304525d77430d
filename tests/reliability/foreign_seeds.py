"""Sound inputs of what others published: lit-llama, TencentPretrain, quantized layouts, coded releases, CSVs, …"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.published import LAYOUTS, write_published
from tests.releases import release_world

__all__ = ["COMMANDS", "make_foreign_seeds"]

_MODEL = (
    "inspect {x}", "inspect {x} --tensors", "diff {x} {base}", "convert {x} --to hf -o {out}",
    "convert {x} --to gguf -o {out} --dry-run", "quantize {x} --bits 8 -o {out} --dry-run",
    "delta make {base} {x} -o {out} --dry-run", "lora merge {x} {adapter} -o {out} --dry-run",
    "lora extract {base} {x} -o {out} --dry-run --rank 2", "export {x} --to onnx -o {out} --dry-run",
    "perplexity {x} --text {corpus}",
)  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "lit": _MODEL,
    "tencent": _MODEL,
    "gptq": (*_MODEL, "generate {x} hi --max-tokens 1"),
    "awq": (*_MODEL, "generate {x} hi --max-tokens 1"),
    **dict.fromkeys(
        LAYOUTS, (*_MODEL, "generate {x} hi --max-tokens 1", "convert {x} --to hf --dtype float16 -o {out}")
    ),
    "mxfp4": ("inspect {x}", "inspect {x} --tensors", "diff {x} {x}", "convert {x} --to hf --dtype bfloat16 -o {out}"),
    "lit_adapter": (
        "inspect {x}", "lora merge {base} {x} --alpha 4 -o {out}", "lora combine {x} -o {out}",
    ),
    "mlx_adapter": ("inspect {x}", "lora merge {base} {x} -o {out}", "lora combine {x} {adapter} -o {out}"),
    "xor": (
        "delta xor {seeds}/coded_base {x} -o {out}", "delta xor {seeds}/coded_base {x} -o {out} --dry-run",
        "delta apply {seeds}/coded_base {x} -o {out} --dry-run", "inspect {x}",
    ),
    "coded_base": ("delta xor {x} {seeds}/xor -o {out}", "delta xor {x} {seeds}/xor -o {out} --dry-run"),
    "enc": (
        "delta decrypt {seeds}/key/consolidated.00.pth {x} -o {out}", "inspect {x}",
        "delta decrypt {seeds}/key/consolidated.00.pth {x} -o {out} --dry-run",
    ),
    "hashes": (
        "delta xor {seeds}/coded_base {seeds}/xor --hashes {x}/base.md5 -o {out}",
        "delta xor {seeds}/coded_base {seeds}/xor --expect {x}/tuned.sha256 -o {out}",
    ),
    "bench": (
        "eval {base} --bench mmlu --data {x} --shots 1 --limit 1", "eval {base} --bench mmlu --data {x} --shots 0",
        "eval {base} --bench ceval --data {x} --shots 1 --limit 1",
    ),
}  # fmt: skip


def make_foreign_seeds(folder: Path) -> None:
    """Write all of them below `folder`, where `hf` is."""
    import torch

    state = load_file(folder / "hf/model.safetensors")
    for name, file, make in (("lit", "lit-llama.pth", _lit), ("tencent", "chatllama.bin", _tencent)):
        (folder / name).mkdir()
        torch.save({k: torch.from_numpy(v.copy()) for k, v in make(state).items()}, folder / name / file)
        for beside in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(folder / "hf" / beside, folder / name / beside)
    sizes = {"emb_size": 32, "feedforward_size": 64, "hidden_size": 32, "heads_num": 4, "layers_num": 2}
    kinds = {"max_seq_length": 256, "rotary_position_embedding": True, "layernorm": "rms", "feed_forward": "gated"}
    (folder / "tencent/7b_config.json").write_text(json.dumps(sizes | kinds))
    for method in ("gptq", "awq"):
        _packed(folder / "hf", folder / method, method)
    for name in LAYOUTS:
        write_published(folder / "hf", folder / name, name)
    _experts(folder / "mxfp4")
    _adapters(folder)
    base = release_world.write_hf(folder / "coded_base")
    tuned = release_world.write_hf(folder / "coded_tuned", tuned=1)
    release_world.write_xor_payload(folder / "xor", base, tuned)
    key = release_world.write_key(folder / "key/consolidated.00.pth")
    release_world.write_encrypted(folder / "enc", tuned, key)
    (folder / "hashes").mkdir()
    for name, of, make_hash in (("base.md5", base, hashlib.md5), ("tuned.sha256", tuned, hashlib.sha256)):
        contents = release_world.contents(of)
        lines = [f"{make_hash(data).hexdigest()}  ./{file}\n" for file, data in contents.items()]
        (folder / "hashes" / name).write_text("".join(lines))
    _questions(folder / "bench")


def _lit(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {"transformer.wte.weight": state["model.embed_tokens.weight"], "lm_head.weight": state["lm_head.weight"]}
    found["transformer.ln_f.scale"] = state["model.norm.weight"]
    names = {"self_attn.o_proj": "attn.c_proj", "mlp.gate_proj": "mlp.c_fc1", "mlp.up_proj": "mlp.c_fc2"}
    for i in range(2):
        of, to = f"model.layers.{i}.", f"transformer.h.{i}."
        found[f"{to}attn.c_attn.weight"] = np.concatenate([state[f"{of}self_attn.{n}_proj.weight"] for n in "qkv"])
        for old, new in (names | {"mlp.down_proj": "mlp.c_proj"}).items():
            found[f"{to}{new}.weight"] = state[f"{of}{old}.weight"]
        found[f"{to}rms_1.scale"] = state[f"{of}input_layernorm.weight"]
        found[f"{to}rms_2.scale"] = state[f"{of}post_attention_layernorm.weight"]
    return found


def _tencent(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {"embedding.word.embedding.weight": state["model.embed_tokens.weight"]}
    found |= {"encoder.layer_norm.weight": state["model.norm.weight"]}
    found |= {"target.lm.output_layer.weight": state["lm_head.weight"]}
    names = {f"self_attn.{n}_proj": f"self_attn.linear_layers.{j}" for j, n in enumerate("qkv")}
    names |= {"self_attn.o_proj": "self_attn.final_linear", "mlp.gate_proj": "feed_forward.linear_gate"}
    names |= {"mlp.up_proj": "feed_forward.linear_1", "mlp.down_proj": "feed_forward.linear_2"}
    names |= {"input_layernorm": "layer_norm_1", "post_attention_layernorm": "layer_norm_2"}
    for i in range(2):
        for old, new in names.items():
            found[f"encoder.transformer.{i}.{new}.weight"] = state[f"model.layers.{i}.{old}.weight"]
    return found


def _packed(base: Path, out: Path, method: str) -> None:
    """Eight integers of 4 bits in a word: along the inputs for GPTQ, along the outputs for AWQ."""
    shutil.copytree(base, out)
    rng, group, tensors = np.random.default_rng(0), 32, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        n_out, n_in = weight.shape
        shape = (n_in // 8, n_out) if method == "gptq" else (n_in, n_out // 8)
        stem, n_groups = name.removesuffix("weight"), n_in // group
        tensors[f"{stem}qweight"] = rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
        tensors[f"{stem}qzeros"] = np.full((n_groups, n_out // 8), 0x77777777, dtype=np.int32)
        tensors[f"{stem}scales"] = np.full((n_groups, n_out), 0.02, dtype=np.float16)
        if method == "gptq":
            tensors[f"{stem}g_idx"] = (np.arange(n_in) // group).astype(np.int32)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    entry = {"quant_method": method, "bits": 4, "group_size": group}
    entry |= {"sym": True, "desc_act": False} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    (out / "quantize_config.json").write_text(json.dumps(entry))


def _experts(out: Path) -> None:
    """Two experts in float4, as gpt-oss has them."""
    rng, stem = np.random.default_rng(0), "model.layers.0.mlp.experts.down_proj"
    parts = {"blocks": rng.integers(0, 256, (2, 32, 1, 16), np.uint8), "scales": np.full((2, 32, 1), 120, np.uint8)}
    out.mkdir()
    save_file({f"{stem}_{end}": part for end, part in parts.items()}, out / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    (out / "config.json").write_text(json.dumps(config))


def _adapters(folder: Path) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    (folder / "lit_adapter").mkdir()
    pairs = {}
    for i in range(2):
        at = f"transformer.h.{i}.attn.c_attn."
        pairs |= {f"{at}lora_A": torch.randn(4, 32, generator=generator)}
        pairs |= {f"{at}lora_B": torch.randn(64, 2, generator=generator)}
    torch.save(pairs, folder / "lit_adapter/lit-llama-lora-finetuned.pth")
    (folder / "mlx_adapter").mkdir()
    parts = {}
    for i in range(2):
        at = f"model.layers.{i}.self_attn.q_proj."
        parts |= {f"{at}lora_a": torch.randn(32, 2, generator=generator).numpy()}
        parts |= {f"{at}lora_b": torch.randn(2, 32, generator=generator).numpy()}
    save_file(parts, folder / "mlx_adapter/adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}
    (folder / "mlx_adapter/adapter_config.json").write_text(json.dumps(config))


def _questions(out: Path) -> None:
    """One subject of each of the two benchmarks, which have layouts of their own."""
    rows = [[f"What is {i} and {i}?", *(str(2 * i + j) for j in range(4)), "A"] for i in range(3)]
    header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for split in ("dev", "test", "val"):
        (out / split).mkdir(parents=True)
        files = {"astronomy": rows, "law": [header, *([i, *row, "because"] for i, row in enumerate(rows))]}
        for subject, lines in files.items():
            with (out / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(lines)
