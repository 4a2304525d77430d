"""Record what llama.cpp makes of floats: types of every preset, and the error of every type of blocks.

    python -m tests.golden.gguf.record        # needs llama-cpp-python; writes the JSON files beside it

`presets.json`: for each model of `MODELS` and each preset, with an importance matrix and, where it differs, without,
the types of all matrices. `errors.json`: for each of `WEIGHTS` and each type of blocks, the root of the mean squared
error, and of the same weighted by `importance()`. `blocks.json`: for types that the gguf library does not dequantize
the bytes of two rows of two blocks, as hex, and their values.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import gguf
import numpy as np
from gguf import quants

import llmkit
from llmkit.architecture.registry import default_registry
from llmkit.decoder.contract import random_checkpoint
from llmkit.transforms.convert import convert

HERE = Path(__file__).parent
PRESETS = (
    "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16",
)  # fmt: skip
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
# Family and config; the sizes that presets look at: layers, heads, rows that 256 divides or not, a tied head.
_LLAMA = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "vocab_size": 64}
_CARRIED = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
}
MODELS = {
    "grouped": ("llama", _LLAMA | {"num_hidden_layers": 17, "num_key_value_heads": 2}),
    "plain, tied": ("llama", _LLAMA | {"num_hidden_layers": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}),
    "uneven rows": ("llama", _LLAMA | {"num_hidden_layers": 2, "num_key_value_heads": 12, "hidden_size": 96,
                                       "num_attention_heads": 12}),
    "rows that nothing divides": ("llama", _LLAMA | {"num_hidden_layers": 1, "num_key_value_heads": 2,
                                                     "hidden_size": 72, "num_attention_heads": 4}),
    "fused": ("falcon", {"hidden_size": 256, "num_hidden_layers": 18, "num_attention_heads": 4, "vocab_size": 64}),
    "streams": ("gemma3n", _CARRIED | {"laurel_rank": 64, "hidden_size_per_layer_input": 256,
                                       "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95] * 4}),
    "inputs": ("gemma4", _CARRIED | {"hidden_size_per_layer_input": 256}),
    "experts beside": ("gemma4", _CARRIED | {
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True, "enable_moe_block": True,
        "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 256,
    }),
    "80 layers": ("llama", _LLAMA | {"num_hidden_layers": 80, "num_key_value_heads": 4, "intermediate_size": 32}),
}  # fmt: skip
# Models of which a few presets tell enough.
_FEW = {"80 layers": ("Q3_K_M", "Q4_K_M", "Q5_K_S"), "rows that nothing divides": ("Q4_K_M", "IQ4_XS"),
        **dict.fromkeys(("streams", "inputs", "experts beside"), ("Q2_K", "Q4_K_M", "IQ4_XS"))}  # fmt: skip


def model(name: str):
    """A random checkpoint of `MODELS`."""
    family, changes = MODELS[name]
    registry = default_registry()
    architecture = next(a for p in registry.plugins if (a := registry.load(p)).name == family)
    return replace(random_checkpoint(architecture, architecture.tiny_config() | changes), label="m")


def _random() -> np.ndarray:
    """Rows of different sizes, heavy tails, a row of zeros, one of a single value."""
    rng = np.random.default_rng(11)
    x = rng.standard_t(5, (64, 1024)) * np.exp(rng.standard_normal((64, 1))) * 0.02
    x[3], x[4] = 0, 0.5
    return x.astype(np.float32)


def _trained() -> np.ndarray:
    """The matrices of a layer of the mini model, in rows of 256."""
    ckpt = llmkit.open_checkpoint(HERE.parents[2] / "evalsets" / "mini" / "base")
    names = [n for n, lazy in ckpt.tensors.items() if ".layers.1." in n and len(lazy.shape) == 2]
    return np.concatenate([ckpt.tensors[n].load().float().numpy().reshape(-1, 256) for n in names])


NEWER = [("Q1_0", 128, 18), ("Q2_0", 64, 18)]

WEIGHTS = {"random": _random, "trained": _trained}
"""Float32 [rows, in], 256 divides in."""


def importance(n: int) -> np.ndarray:
    """Float32 [n], of each column."""
    return np.random.default_rng(12).gamma(0.7, 1.0, n).astype(np.float32)


def measured_error(values: np.ndarray, weights: np.ndarray, *, is_weighted: bool) -> float:
    """The root of the mean of the squared error, each column weighted by its importance."""
    error = (values.astype(np.float64) - weights) ** 2
    return float(np.sqrt((error * importance(weights.shape[1]) if is_weighted else error).mean()))


def by_ggml(x: np.ndarray, name: str, squares: np.ndarray | None) -> np.ndarray:
    """Float32 [rows, in] as ggml restores it from its own blocks of a type, importance of columns or none."""
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    kind = gguf.GGMLQuantizationType[name]
    n_block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((len(x), x.shape[1] // n_block * nbytes), np.uint8)
    quantize(int(kind), x.ctypes.data, out.ctypes.data, 0, *x.shape, None if squares is None else squares.ctypes.data)
    return quants.dequantize(out, kind)


def _blocks() -> dict[str, dict[str, object]]:
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    rng, found = np.random.default_rng(13), {}
    for name, n_block, nbytes in NEWER:
        raw = rng.integers(0, 256, (2, 2, nbytes), dtype=np.uint8)
        raw[..., :2] = rng.standard_normal((2, 2, 1)).astype(np.float16).view(np.uint8)
        values = np.zeros((2, 2 * n_block), np.float32)
        restore = getattr(library, f"dequantize_row_{name.lower()}")
        restore(ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(values.size))
        found[name] = {"raw": [row.tobytes().hex() for row in raw], "values": values.tolist()}
    return found


def _errors() -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for of, made in WEIGHTS.items():
        x = made()
        squares, found[of] = importance(x.shape[1]), {}
        for name in TYPES:
            found[of][name] = {}
            for key, given in (("plain", None), ("weighted", squares)):
                error = measured_error(by_ggml(x, name, given), x, is_weighted=given is not None)
                found[of][name][key] = float(f"{error:.6g}")
    return found


def _types(path: Path, preset: str, imatrix: dict[str, np.ndarray]) -> dict[str, str]:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{preset}")
    params.nthread = 1
    keep = []
    if imatrix:
        entry = llama_cpp.llama_model_imatrix_data
        entries = (entry * (len(imatrix) + 1))()
        for i, (name, values) in enumerate(imatrix.items()):
            keep.append(name.encode())
            entries[i] = entry(keep[-1], values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(values))
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(entry))
    out = path.with_name(f"{preset}.gguf")
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(params)) == 0
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors if len(t.shape) > 1}
    out.unlink()
    return found


def compact(types: dict[str, str]) -> dict[str, str]:
    """`stem -> types of its layers`: `Q6_K*2 Q4_K` for two layers and one."""
    found: dict[str, list[str]] = {}
    ordered = sorted(types, key=lambda n: (int(n.split(".")[1]) if n.startswith("blk.") else -1, n))
    for name in ordered:
        if "norm" not in name:
            stem = ".".join(name.split(".")[2:]) if name.startswith("blk.") else name
            found.setdefault(stem, []).append(types[name])
    runs = {stem: [(kind, len([*run])) for kind, run in groupby(kinds)] for stem, kinds in sorted(found.items())}
    return {stem: " ".join(f"{kind}*{n}" for kind, n in run) for stem, run in runs.items()}


def _write_lines(name: str, found: Mapping[str, object]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    (HERE / name).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Write the files."""
    presets: dict[str, dict[str, dict[str, str]]] = {}
    for name in MODELS:
        presets[name] = {}
        with tempfile.TemporaryDirectory() as scratch:
            llmkit.save(convert(model(name), to="gguf", type="f16"), Path(scratch) / "f16")
            path = Path(scratch) / "f16" / "m-F16.gguf"
            shapes = {t.name: t.shape for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1}
            sizes = {n: int(shape[0] * np.prod(shape[2:])) for n, shape in shapes.items() if n.startswith("blk.")}
            imatrix = {n: np.ones(size, np.float32) for n, size in sizes.items()}
            for preset in _FEW.get(name, PRESETS):
                for end, given in ((" imatrix", imatrix), ("", {})):
                    if preset == "Q2_K_S" and not given:
                        continue  # it needs one
                    found = compact(_types(path, preset, given))
                    if presets[name].get(preset + " imatrix") != found:
                        presets[name][preset + end] = found
    _write_lines("presets.json", presets)
    _write_lines("errors.json", _errors())
    _write_lines("blocks.json", _blocks())


if __name__ == "__main__":
    main()
