"""A product of a batch with a matrix of SmolLM2 in every kernel for int4 and int8 that torch and ONNX Runtime have.

    OMP_NUM_THREADS=1 python tests/bench/quantized_products.py [--rows 1024]

Milliseconds of one thread's processor time, the best of three, beside the float32 product that evaluation does with
dequantized weights. Only speed is measured: the values are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

SHAPES = [(3072, 576), (576, 1536)]  # gate and up in one, down


def best(run: Callable[[], object]) -> float:
    """Milliseconds of this thread."""
    run()
    found = []
    for _ in range(3):
        before = time.thread_time()
        run()
        found.append(time.thread_time() - before)
    return 1e3 * min(found)


def of_torch(rows: int, n: int, k: int) -> dict[str, float]:
    ops, x = torch.ops.aten, torch.randn(rows, k)
    weight = torch.randn(n, k)
    found = {"float32": best(lambda: torch.nn.functional.linear(x, weight))}
    packed = ops._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
    scales, codes = torch.rand(k // 64, n, 2), torch.randint(-127, 127, (n, k), dtype=torch.int8)
    for dtype in (torch.float32, torch.bfloat16):
        y, name = x.to(dtype), str(dtype).removeprefix("torch.")
        found[f"int4pack, {name}"] = best(
            lambda y=y: ops._weight_int4pack_mm_for_cpu(y, packed, 64, scales.to(y.dtype))
        )
        found[f"int8pack, {name}"] = best(lambda y=y: ops._weight_int8pack_mm(y, codes, torch.ones(n, dtype=y.dtype)))
    return found


def of_onnxruntime(rows: int, n: int, k: int, block: int = 32) -> dict[str, float]:
    x = np.random.default_rng(0).standard_normal((rows, k), dtype=np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def session(node: object, weights: dict[str, np.ndarray]) -> float:
        held = [
            helper.make_tensor(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, value.tobytes(), raw=True
            )
            for name, value in weights.items()
        ]
        ends = [helper.make_tensor_value_info(a, TensorProto.FLOAT, [rows, b]) for a, b in (("x", k), ("y", n))]
        graph = helper.make_graph([node], "product", ends[:1], ends[1:], held)
        sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=9).SerializeToString()
        made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return best(lambda: made.run(None, {"x": x}))

    plain = helper.make_node("MatMul", ["x", "w"], ["y"])
    found = {"ONNX Runtime, float32": session(plain, {"w": np.ones((k, n), np.float32)})}
    for bits in (4, 8):
        weights = {
            "w": np.full((n, k // block, block * bits // 8), 7, np.uint8),
            "s": np.ones(n * (k // block), np.float32),
        }
        for level in (1, 4):
            settings = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
            node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", **settings)
            found[f"MatMulNBits {bits}, accuracy level {level}"] = session(node, weights)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    rows = parser.parse_args().rows
    torch.set_num_threads(1)
    with torch.inference_mode():
        for n, k in SHAPES:
            print(f"[{rows}, {k}] by [{n}, {k}], ms")
            for name, ms in (of_torch(rows, n, k) | of_onnxruntime(rows, n, k)).items():
                print(f"  {name:<32} {ms:8.1f}")


if __name__ == "__main__":
    main()
