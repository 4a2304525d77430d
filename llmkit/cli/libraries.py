"""Warnings and log lines of libraries while a command runs, which are no part of an answer.

A user can do nothing about most of it (an argument of theirs that llmkit passes, a default that will change), and lines
between the words of a text are noise. Shown with `-v`, where it comes as log lines on stderr.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# Read by the libraries when they are imported: they have handlers of their own.
_VERBOSITY = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "critical"}


@contextmanager
def libraries(verbosity: int) -> Iterator[None]:
    """Hide the output of libraries; with `-v` show llmkit's log, with `-vv` all logs.

    Args:
        verbosity: the number of `-v`.
    """
    if verbosity < 2:
        for name, value in _VERBOSITY.items():
            os.environ.setdefault(name, value)
    ours, root = logging.getLogger("llmkit"), logging.getLogger()
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if verbosity else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    talkative = root if verbosity > 1 else ours
    level = ours.level
    ours.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO if verbosity else level)
    talkative.addHandler(handler)
    # Without any handler at the root, Python writes warnings of every library to stderr itself.
    silent = logging.NullHandler()
    root.addHandler(silent)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _logged
            yield
    finally:
        ours.setLevel(level)
        talkative.removeHandler(handler)
        root.removeHandler(silent)


def _logged(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    logging.getLogger("py.warnings").info("%s: %s (%s:%d)", category.__name__, message, filename, lineno)
