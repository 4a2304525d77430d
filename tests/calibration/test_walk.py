"""One walk over the blocks serves every step of a run, and no other run's."""

from __future__ import annotations

import pytest

from llmkit.architecture.registry import default_registry
from llmkit.calibration.observe import ObserverHook
from llmkit.calibration.stage import BlockStage
from llmkit.decoder.contract import random_checkpoint
from llmkit.pipeline.stage import BlockResult
from llmkit.tensors.lazy import Context
from llmkit.tensors.stopped import Stopped, stoppable


def test_a_run_that_was_stopped_leaves_nothing_to_the_next(tmp_path):
    """A step of the stopped run may have begun the walk anew after the error that stopped it."""
    registry = default_registry()
    architecture = next(registry.load(p) for p in registry.plugins if p.name == "llama")
    ckpt = random_checkpoint(architecture, architecture.tiny_config())
    computed, stopped = [], []

    def compute(blocks, index, state, context):
        if context.is_stopped():
            raise Stopped
        computed.append(index)
        return BlockResult({}, [("hidden", blocks.run(index, state["hidden"].load(), ObserverHook([])))], [])

    stage = BlockStage(ckpt, lambda longest: [[1, 2, 3]], lambda: (2, None), compute)
    with stoppable(lambda: bool(stopped)):
        first = Context()
        first.workspace = tmp_path
        stage.block(0, first)
        stopped.append(True)
        with pytest.raises(Stopped):
            stage.block(1, first)
    second = Context()
    second.workspace = tmp_path
    assert stage.block(1, second) is stage.block(1, second)
    assert computed == [0, 1]
