"""Runs that are interrupted while they compute block after block."""

from __future__ import annotations

from llmkit.pipeline.journal import Journal

__all__ = ["stopped_in_block"]


def stopped_in_block(monkeypatch, block):
    """The names of blocks as they come to be noted; the run is interrupted before the first note of one."""
    append, computed = Journal.append, []

    def interrupted(self, line):
        if "block" in line:
            computed.append(line["block"])
            if line["block"] == block and computed.count(block) == 1:
                raise KeyboardInterrupt
        return append(self, line)

    monkeypatch.setattr(Journal, "append", interrupted)
    return computed
