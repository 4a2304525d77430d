"""How fast blocks of GGUF files are made of floats, and how large their error is, beside ggml's own.

    python tests/bench/gguf_quantize.py [--shape 1024 4096] [--types Q4_K,Q6_K] [--repeat 3]

Needs llama-cpp-python, whose native library has `ggml_quantize_chunk`: what `llama-quantize` calls for each matrix.
Both work on one thread, in turns, on the same random float32 matrix, with an importance of each column and without; the
least processor time of the runs is shown. The error is the mean of the squares, weighted by the importance where there
is one.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import quants

from llmkit.quantization.codecs.gguf import quantized
from llmkit.tensors.constant import constant

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def native() -> Callable[[str, np.ndarray, np.ndarray | None], np.ndarray]:
    """ggml's own: blocks of a type, uint8 [rows, bytes], of float32 [rows, in] and the importance of the columns."""
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def run(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        kind = gguf.GGMLQuantizationType[name]
        n_block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        out = np.zeros((len(x), x.shape[1] // n_block * nbytes), np.uint8)
        pointer = importance.ctypes.data if importance is not None else None
        quantize(int(kind), x.ctypes.data, out.ctypes.data, 0, *x.shape, pointer)
        return out

    return run


def own(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """The same of llmkit."""
    given = None if importance is None else constant(torch.from_numpy(importance))
    return quantized(constant(torch.from_numpy(x)), name, "w", given).load().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 4096))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    x = (rng.standard_t(8, args.shape) * 0.02).astype(np.float32)
    squares = rng.gamma(0.7, 1.0, args.shape[1]).astype(np.float32)
    tools = {"llmkit": own, "ggml": native()}
    print(f"{args.shape[0]} x {args.shape[1]}\n{'':24}{'llmkit':>9} s{'ggml':>9} s{'ratio':>8}{'error, ratio':>14}")
    for name in args.types.split(","):
        for label, importance in (("weighted", squares), ("plain", None)):
            seconds, errors = dict.fromkeys(tools, float("inf")), {}
            for _ in range(args.repeat):
                for tool, run in tools.items():
                    started = time.process_time()
                    made = run(name, x, importance)
                    seconds[tool] = min(seconds[tool], time.process_time() - started)
                    error = (quants.dequantize(made, gguf.GGMLQuantizationType[name]) - x) ** 2
                    errors[tool] = float((error * importance if importance is not None else error).mean())
            ratio, of_errors = seconds["llmkit"] / seconds["ggml"], errors["llmkit"] / errors["ggml"]
            both = "".join(f"{seconds[tool]:>11.3f}" for tool in tools)
            print(f"{name:<14}{label:<10}{both}{ratio:>8.2f}{of_errors:>14.3f}", flush=True)


if __name__ == "__main__":
    main()
