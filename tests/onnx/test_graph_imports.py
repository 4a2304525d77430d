"""The graph of every family is built without torch: its positions, biases and constants, too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra cpu)")
SCRIPT = """
import json, sys
for name in ("torch", "transformers"):
    sys.modules[name] = None  # importing it is an error
from llmkit.architecture.registry import default_registry
from llmkit.onnx.model import build_graph
from llmkit.tensors.lazy import Apply
from llmkit.tensors.spec import DType, TensorSpec

registry, built = default_registry(), []
for plugin in registry.plugins:
    if not plugin.is_builtin:
        continue
    architecture = registry.load(plugin)
    for variant in (None, *architecture.variants):
        model = architecture.bind(architecture.tiny_config(variant))
        specs = {name: TensorSpec(DType.F32, slot.shape) for name, slot in model.tensors().items()}
        tensors = {name: Apply("none", (), spec, None).output() for name, spec in specs.items()}
        build_graph(model, tensors, lambda name, lazy: None)
        built.append([plugin.name, variant])
print(json.dumps(built))
"""


def test_every_family():
    from tiny_graphs import CASES

    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [tuple(case) for case in json.loads(done.stdout)] == CASES
