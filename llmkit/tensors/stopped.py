"""How a step that takes long gives up when its run was stopped."""

from __future__ import annotations


class Stopped(Exception):
    """The run was stopped while a step was computed; nothing of the step counts."""
