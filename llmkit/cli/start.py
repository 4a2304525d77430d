"""The console script: signals are taken before the program is imported, which takes a moment."""

from __future__ import annotations

from typing import NoReturn

from llmkit.cli.interrupts import Interrupted, terminable
from llmkit.lazy_imports import uninterrupted
from llmkit.pipeline.cores import limit_threads


def run() -> NoReturn:
    """Import the program and run it."""
    with terminable():
        try:
            with uninterrupted():
                limit_threads()
                from llmkit.cli import app
        except KeyboardInterrupt:
            raise SystemExit(app.report_interrupt(Interrupted(is_resumable=False))) from None
        app.run()
