"""One small sound input of every format that llmkit reads, and the commands that read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.reliability import foreign_seeds

__all__ = ["COMMANDS", "make_seeds"]

_LOOK = ("inspect {x}", "inspect {x} --tensors", "diff {x} {x}", "convert {x} --to hf -o {out} --dry-run")
_WRITE = (
    "convert {x} --to hf -o {out}", "convert {x} --to gguf -o {out} --dry-run", "convert {x} --to meta -o {out}",
    "convert {x} --to llama2c -o {out} --dry-run", "convert {x} --to litgpt -o {out} --dry-run",
    "quantize {x} --bits 8 -o {out} --dry-run", "delta make {base} {x} -o {out} --dry-run",
    "delta apply {x} {delta} -o {out} --dry-run", "lora merge {x} {adapter} -o {out} --dry-run",
    "lora extract {base} {x} -o {out} --dry-run --rank 2", "export {x} --to onnx -o {out} --dry-run",
)  # fmt: skip
_TEXT = (
    "vocab info {x}", "vocab extend {x} --with {base} -o {out} --dry-run",
    "vocab extend {base} --with {x} -o {out} --dry-run", "vocab trim {x} --corpus {corpus} -o {out} --dry-run",
    "generate {x} hi --max-tokens 1", "perplexity {x} --text {corpus}",
)  # fmt: skip
_MODEL = (*_LOOK, *_WRITE, *_TEXT)
# Seed -> the commands that it is given to. {x}: the changed input; {seeds}: all sound ones.
COMMANDS: dict[str, tuple[str, ...]] = {
    "hf": _MODEL,
    "sharded": (*_LOOK, *_WRITE),
    "bin": (*_LOOK, *_WRITE),
    "legacy": (*_LOOK, *_WRITE[:3]),
    "gguf": _MODEL,
    "gguf_q8": (*_LOOK, *_WRITE),
    "meta": _MODEL,
    "litgpt": (*_LOOK, *_WRITE),
    "llama2c": _MODEL,
    "llama2c_q8": (*_LOOK, *_WRITE),
    "easylm": (*_LOOK, *_WRITE),
    "pieces": (*_LOOK, *_TEXT, "convert {x} --to gguf -o {out} --dry-run", "convert {x} --to gguf -o {out}"),
    "quantized": (*_LOOK, *_WRITE, "generate {x} hi --max-tokens 1"),
    "written": ("verify {x}", "explain {x} lm_head.weight", "inspect {x}", "delta apply {x} {delta} -o {out}"),
    "delta": (*_LOOK, "delta apply {base} {x} -o {out}", "delta apply {base} {x} -o {out} --dry-run", "verify {x}"),
    "adapter": (
        "inspect {x}", "lora merge {base} {x} -o {out}", "lora merge {base} {x} -o {out} --dry-run",
        "lora combine {x} {adapter} -o {out} --dry-run", "lora combine {x} {adapter} -o {out}",
    ),
    "onnx": (
        "inspect {x}", "verify {x}", "generate {x} hi --max-tokens 1", "diff {x} {x}",
        "convert {x} --to hf -o {out} --dry-run", "perplexity {x} --text {corpus}",
    ),
    "texts": (
        "generate {base} --messages {x}/talk.json --max-tokens 1", "perplexity {base} --text {x}/text.txt",
        "generate {base} --messages {x}/talk.jsonl --max-tokens 1",
        "vocab trim {base} --corpus {x}/text.txt -o {out} --dry-run",
        "convert {base} --to hf -o {x}/other --dry-run",
    ),
    **foreign_seeds.COMMANDS,
}  # fmt: skip


def make_seeds(folder: Path, run: Callable[[list[str]], int]) -> None:
    """Write all seeds below `folder`, through `run` (a command line of llmkit) where llmkit writes the format."""
    folder.mkdir(parents=True, exist_ok=True)

    def llmkit(line: str) -> None:
        words = line.split()
        if run([str(folder / w[1:]) if w.startswith("@") else w for w in words]) != 0:
            raise RuntimeError(f"no seed: llmkit {line}")

    _model(folder / "hf")
    _tuned(folder / "hf", folder / "tuned")
    llmkit("convert @hf --to hf --max-shard-size 60kB -o @sharded")
    llmkit("convert @hf --to bin -o @bin")
    llmkit("convert @hf --to gguf --type f16 -o @gguf")
    llmkit("convert @hf --to gguf --type q8_0 -o @gguf_q8")
    llmkit("convert @hf --to litgpt -o @litgpt")
    llmkit("quantize @hf --bits 8 -o @quantized")
    llmkit("delta make @hf @tuned -o @delta")
    llmkit("convert @hf --to hf --dtype float16 -o @written")
    llmkit("export @hf --to onnx --bits 4 --group-size 32 --weights copy --no-check -o @onnx")
    _pieces(folder / "hf", folder / "pieces")
    llmkit("convert @pieces --to meta -o @meta")
    llmkit("convert @pieces --to llama2c -o @llama2c")
    llmkit("convert @pieces --to llama2c --file-version 2 -o @llama2c_q8")
    _legacy(folder / "hf", folder / "legacy")
    _stream(folder / "hf", folder / "easylm")
    _adapter(folder / "adapter")
    (folder / "texts").mkdir()
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    (folder / "texts/talk.json").write_text(json.dumps(talk))
    (folder / "texts/talk.jsonl").write_text("\n".join(map(json.dumps, talk)))
    (folder / "texts/text.txt").write_text("some text of a few words\n" * 4)
    foreign_seeds.make_foreign_seeds(folder)


def _model(out: Path) -> None:
    rng, hidden, vocab = np.random.default_rng(0), 32, 259
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,),
    }  # fmt: skip
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {at + f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"}
        shapes |= {at + f"mlp.{n}_proj": (64, hidden) for n in ("gate", "up")} | {at + "mlp.down_proj": (hidden, 64)}
        shapes |= {at + n: (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    weights = {k + ".weight": (rng.standard_normal(s) * 0.1 + (len(s) == 1)).astype("f4") for k, s in shapes.items()}
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {t: i for i, t in enumerate([*special, *letters])}, "merges": [],
    }  # fmt: skip
    made = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(special)],
        "pre_tokenizer": level, "decoder": level, "model": model,
    }  # fmt: skip
    (out / "tokenizer.json").write_text(json.dumps(made))
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (out / "tokenizer_config.json").write_text(json.dumps({**about, "unk_token": "<unk>", "chat_template": template}))
    (out / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def _tuned(base: Path, out: Path) -> None:
    shutil.copytree(base, out)
    weights = load_file(base / "model.safetensors")
    save_file({k: v * np.float32(1.01) for k, v in weights.items()}, out / "model.safetensors", {"format": "pt"})


def _pieces(base: Path, out: Path) -> None:
    """The model with a SentencePiece tokenizer."""
    from llmkit.tokenization.sentencepiece_model import Piece, PieceKind
    from llmkit.tokenization.wire import encode_field

    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base / name, out / name)
    kinds = [("<unk>", PieceKind.UNKNOWN), ("<s>", PieceKind.CONTROL), ("</s>", PieceKind.CONTROL)]
    kinds += [(f"<0x{i:02X}>", PieceKind.BYTE) for i in range(256)]
    trainer = encode_field(3, 2) + encode_field(4, 259) + encode_field(35, 1)
    normalizer = encode_field(1, b"identity") + encode_field(3, 1) + encode_field(4, 0) + encode_field(5, 1)
    data = b"".join(Piece(text, 0.0, kind).encoded() for text, kind in kinds)
    (out / "tokenizer.model").write_bytes(data + encode_field(2, trainer) + encode_field(3, normalizer))
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (out / "tokenizer_config.json").write_text(json.dumps(about))


def _legacy(base: Path, out: Path) -> None:
    import torch

    out.mkdir()
    shutil.copyfile(base / "config.json", out / "config.json")
    state = {k: torch.from_numpy(v) for k, v in load_file(base / "model.safetensors").items()}
    torch.save(state, out / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def _stream(base: Path, out: Path) -> None:
    """EasyLM's stream, written by hand: pairs of keys and of an extension that holds an array."""
    out.mkdir()
    names = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo"}
    names |= {"gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    ends = {"model.embed_tokens": "wte.embedding", "model.norm": "ln_f.kernel", "lm_head": ""}
    data = b""
    for name, array in load_file(base / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        parts = stem.split(".")
        path = ends.get(stem) if stem in ends else f"h.{parts[2]}.{names[parts[-1]]}.kernel"
        keys = ["params", *(["transformer", *path.split(".")] if path else ["lm_head", "kernel"])]
        stored = array if array.ndim == 1 or stem == "model.embed_tokens" else np.ascontiguousarray(array.T)
        shape = b"".join(b"\xcd" + n.to_bytes(2, "big") for n in stored.shape)
        raw = stored.tobytes()
        inner = b"\x93" + bytes([0x90 + stored.ndim]) + shape + _str("float32") + b"\xc6" + _u32(len(raw)) + raw
        packed = b"\xc9" + _u32(len(inner)) + b"\x01" + inner
        body = bytes([0x90 + len(keys)]) + b"".join(map(_str, keys))
        data += b"\x92" + body + b"\xc6" + _u32(len(packed)) + packed
    (out / "streaming_params").write_bytes(data)


def _str(text: str) -> bytes:
    return bytes([0xA0 + len(text)]) + text.encode()


def _u32(n: int) -> bytes:
    return n.to_bytes(4, "big")


def _adapter(out: Path) -> None:
    rng = np.random.default_rng(2)
    weights = {}
    for i in range(2):
        at = f"base_model.model.model.layers.{i}.self_attn.q_proj."
        weights |= {at + "lora_A.weight": rng.standard_normal((2, 32)).astype("f4")}
        weights |= {at + "lora_B.weight": rng.standard_normal((32, 2)).astype("f4")}
    out.mkdir()
    save_file(weights, out / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj"], "fan_in_fan_out": False, "modules_to_save": None, "use_rslora": False,
        "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
        "layers_pattern": None, "base_model_name_or_path": "base", "inference_mode": True,
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config))
