"""What GroupQueryAttention of ONNX Runtime computes with an int8 cache, held to plain numpy: the export relies on it.

Codes are clip(round half to even(x / scale), -128, 127), a scale for each channel or one for all; queries stay floats,
and every key and value that a query sees has gone through its code, those of the same call included.
"""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

ort = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
N, K, H = 6, 2, 24
CASES = {
    "per channel": {},
    "per tensor": {"kind": "PER_TENSOR"},
    "a batch": {"batch": 2, "chunks": (7, 1, 1)},
    "half precision": {"dtype": np.float16},
    "no bias": {"bias": 0},
    "a bias for each head": {"bias": N},
    "a cap on scores": {"softcap": 3.0},
    "open prefix": {"causal": 0},
    "window": {"window": 4, "bias": 0},
}


def session(kind, bias, softcap, causal, window, dtype, scales):
    """One node: queries, keys and values [B, S, n * H]; past and present int8."""
    float_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    cache = {name: ["B", K, f"{name} length", H] for name in ("past_key", "past_value", "present_key", "present_value")}
    inputs = [("q", float_type, ["B", "S", N * H])] + [(n, float_type, ["B", "S", K * H]) for n in "kv"]
    inputs += [(n, TensorProto.INT8, cache[n]) for n in ("past_key", "past_value")]
    inputs += [("last", TensorProto.INT32, ["B"]), ("total", TensorProto.INT32, [])]
    inputs += [("bias", float_type, ["B", bias, "S", "T"])] if bias else []
    outputs = [("out", float_type, ["B", "S", N * H])]
    outputs += [(n, TensorProto.INT8, cache[n]) for n in ("present_key", "present_value")]
    attributes = {"num_heads": N, "kv_num_heads": K, "kv_cache_bit_width": 8, "k_quant_type": kind, "softcap": softcap}
    attributes |= {"v_quant_type": kind, "causal": causal, "local_window_size": window}
    names = ["q", "k", "v", "past_key", "past_value", "last", "total", "", "", "", "bias" if bias else "", ""]
    node = helper.make_node(
        "GroupQueryAttention", [*names, "k_scale", "v_scale"], [n for n, _, _ in outputs], domain="com.microsoft",
        **attributes,
    )  # fmt: skip
    values = [[helper.make_tensor_value_info(*v) for v in group] for group in (inputs, outputs)]
    held = [numpy_helper.from_array(s, f"{n}_scale") for n, s in zip("kv", scales, strict=True)]
    graph = helper.make_graph([node], "attention", values[0], values[1], held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def heads(x, n):
    return x.reshape(*x.shape[:2], n, H).transpose(0, 2, 1, 3)


def codes(x, scale):
    """x [B, K, T, H] on the grid of `scale`; the kernel multiplies by the inverse, in float32."""
    inverse = np.float32(1) / (scale[None] if scale.ndim > 1 else scale)
    return np.clip(np.rint(x.astype(np.float32) * inverse), -128, 127).astype(np.int8)


def mixed(q, k, v, bias, softcap, causal, window):
    """Attention in float64 of heads [B, n, S or T, H]; the last S keys are the queries' own."""
    k, v = k.repeat(N // K, 1), v.repeat(N // K, 1)
    scores = np.einsum("bnsh,bnth->bnst", q.astype(np.float64), k) * H**-0.5
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    scores = scores + bias if bias is not None else scores
    query, key = np.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None], np.arange(k.shape[2])[None]
    hidden = (key > query) & bool(causal) | (key <= query - window) & (window > 0)
    weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(-1, keepdims=True)))
    return np.einsum("bnst,bnth->bnsh", weights / weights.sum(-1, keepdims=True), v)


def largest_differences(
    *, kind="PER_CHANNEL", batch=1, bias=1, softcap=0.0, causal=1, window=-1, dtype=np.float32, chunks=(7, 5, 1),
    room=0, seed=0,
):  # fmt: skip
    """Of outputs and of codes, over calls that continue each other; with `room` in one buffer, written in place."""
    draw = np.random.default_rng(seed)
    scales = [draw.uniform(0.01, 0.03, (K, 1, H) if kind == "PER_CHANNEL" else (1,)).astype(np.float32) for _ in "kv"]
    run = session(kind, bias, softcap, causal, window, dtype, scales)
    q, k, v = (draw.standard_normal((batch, sum(chunks), n * H)).astype(dtype) for n in (N, K, K))
    buffers = [ort.OrtValue.ortvalue_from_numpy(np.full((batch, K, room, H), 99, np.int8)) for _ in "kv"]
    past, of_outputs, of_codes = 0, 0.0, 0
    for new in chunks:
        cut, total = slice(past, past + new), past + new
        added = draw.standard_normal((batch, bias, new, total)).astype(dtype) if bias else None
        feeds = {"q": q[:, cut], "k": k[:, cut], "v": v[:, cut]} | ({"bias": added} if bias else {})
        feeds |= {"last": np.full(batch, total - 1, np.int32), "total": np.array(total, np.int32)}
        binding = run.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("out")
        for name, buffer in zip(("key", "value"), buffers, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", buffer)
            if room:
                binding.bind_ortvalue_output(f"present_{name}", buffer)
            else:
                binding.bind_output(f"present_{name}")
        run.run_with_iobinding(binding)
        out, *held = binding.get_outputs()
        buffers = buffers if room else held
        wanted = [codes(heads(x[:, :total], K), s) for x, s in zip((k, v), scales, strict=True)]
        for found, expected in zip(held, wanted, strict=True):
            of_codes = max(of_codes, int(np.abs(found.numpy()[:, :, :total].astype(int) - expected).max()))
        restored = [c * s.astype(np.float64) for c, s in zip(wanted, scales, strict=True)]
        expected = mixed(heads(q[:, cut], N), *restored, added, softcap, causal, window)
        of_outputs = max(of_outputs, float(np.abs(heads(out.numpy(), N) - expected).max()))
        past = total
    if room > past:
        assert (buffers[0].numpy()[:, :, past:] == 99).all()
    return of_outputs, of_codes


@pytest.mark.parametrize("room", [0, 40], ids=["new tensors", "in place"])
@pytest.mark.parametrize("case", CASES)
def test_what_it_computes(case, room):
    of_outputs, of_codes = largest_differences(**CASES[case], room=room)
    assert of_codes == 0
    assert of_outputs < (2e-3 if CASES[case].get("dtype") is np.float16 else 2e-6)


def test_what_it_refuses():
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        largest_differences(batch=2, chunks=(7, 5))
