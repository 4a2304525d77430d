"""Ctrl-C during the import of torch."""

from __future__ import annotations

import contextlib
import importlib
import signal

import pytest

from llmkit.tensors.loading import import_torch


def test_an_interrupt_that_the_import_swallows_is_raised_afterwards(monkeypatch):
    real, imported = importlib.import_module, []

    def swallows(name):
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        imported.append(name)
        return real(name)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(importlib, "import_module", swallows)
    with pytest.raises(KeyboardInterrupt):
        import_torch()
    assert imported == ["torch"]
    assert signal.getsignal(signal.SIGINT) is before
