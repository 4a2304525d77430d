"""The short convolution in a graph: padding anywhere, and calls that continue one another, as of plain PyTorch."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from llmkit.onnx.context import GraphContext
from llmkit.onnx.graph import Graph
from llmkit.onnx.states import back_in_place, before_padding, short_convolution

WIDTH, KERNEL = 3, 4


class _Weights:
    """The weights of one convolution, as `GraphWeights` gives them."""

    dtype = "FLOAT"

    def __init__(self, graph, tensors):
        self._graph, self._tensors = graph, tensors

    def has(self, leaf):
        return leaf in self._tensors

    def slot(self, leaf):
        return type("Slot", (), {"shape": tuple(self._tensors[leaf].shape)})

    def value(self, leaf):
        tensor = self._tensors[leaf]
        return self._graph.initializer(leaf, "FLOAT", tensor.shape, tensor.numpy().tobytes())


@pytest.mark.parametrize("has_bias", [True, False])
def test_short_convolution(has_bias):
    tensors = {"conv.weight": torch.randn(WIDTH, 1, KERNEL)}
    if has_bias:
        tensors["conv.bias"] = torch.randn(WIDTH)
    g = Graph("conv")
    ids = g.input("input_ids", "INT64", ["batch_size", "sequence_length"])
    mask = g.input("attention_mask", "INT64", ["batch_size", "total_sequence_length"])
    x = g.input("x", "FLOAT", ["batch_size", "sequence_length", WIDTH])
    context = GraphContext(g, None, "FLOAT", "attention", ids, mask, ids)
    y = back_in_place(context, short_convolution(context, _Weights(g, tensors), 0, before_padding(context, x)))
    g.output(y, "y", "FLOAT", ["batch_size", "sequence_length", WIDTH])
    assert context.state == {"past_state.0.conv": "present_state.0.conv"}
    session = onnxruntime.InferenceSession(g.model().SerializeToString())
    masks = [[[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], [[1, 0], [1, 1], [0, 1]], [[1], [1], [1]]]
    state, seen = np.zeros((3, KERNEL - 1, WIDTH), np.float32), np.zeros((3, 0), np.int64)
    rows, outputs = [[], [], []], [[], [], []]
    for real in (np.array(m, dtype=np.int64) for m in masks):
        new = torch.randn(*real.shape, WIDTH)
        seen = np.concatenate([seen, real], 1)
        feeds = {"input_ids": np.zeros_like(real), "attention_mask": seen, "x": new.numpy(), "past_state.0.conv": state}
        state, found = session.run(["present_state.0.conv", "y"], feeds)
        for i in range(3):
            rows[i].append(new[i, real[i] != 0])
            outputs[i].append(torch.from_numpy(found[i, real[i] != 0]))
    for row, found in zip(rows, outputs, strict=True):
        padded = torch.nn.functional.pad(torch.cat(row).T[None], (KERNEL - 1, 0))
        wanted = torch.nn.functional.conv1d(padded, tensors["conv.weight"], tensors.get("conv.bias"), groups=WIDTH)
        torch.testing.assert_close(torch.cat(found), wanted[0].T, atol=1e-5, rtol=0)
