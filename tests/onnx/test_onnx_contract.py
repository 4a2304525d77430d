"""The ONNX part of the contract of plugins holds for all of them, and bites."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from tiny_graphs import PLUGINS

from llmkit.architecture.kinds import GatedMLP
from llmkit.decoder.mlp import build_mlp
from llmkit.onnx import contract
from llmkit.onnx.contract import check_graphs

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")


@pytest.mark.parametrize("name", PLUGINS)
def test_graphs_of_tiny_models(name):
    checks = check_graphs(PLUGINS[name])
    assert len(checks) == 1 + len(PLUGINS[name].variants)
    assert [f"{c.name}: {c.problem or c.note}" for c in checks if c.problem or c.note] == []
    assert all(0 < c.difference <= 1e-5 for c in checks)


def test_a_graph_that_computes_something_else_breaks_it(monkeypatch):
    built = contract.build_graph

    def wrong(*args, **options):
        graph = built(*args, **options)
        for node in graph.graph.node:
            for attribute in node.attribute:
                if attribute.name == "scale" and node.op_type == "GroupQueryAttention":
                    attribute.f *= 1.01
        return graph

    monkeypatch.setattr(contract, "build_graph", wrong)
    (check, *_) = check_graphs(replace(PLUGINS["llama"], variants={}))
    assert check.problem.startswith("logits differ by ")


@dataclass(frozen=True)
class Odd(GatedMLP):
    """A kind that torch can read, and the graph reader cannot."""

    def torch_reader(self, weights):
        return build_mlp(GatedMLP(self.act), weights)


def test_a_kind_without_an_emitter_is_noted_not_blamed():
    llama = PLUGINS["llama"]
    odd = replace(llama, block=replace(llama.block, mlp=Odd("silu")), variants={})
    (check,) = check_graphs(odd)
    assert check.is_ok
    assert check.difference is None
    assert check.note.startswith("none: ")
    assert "Odd" in check.note
