"""The file that a bug leaves behind, for its report."""

from __future__ import annotations

import platform
import shlex
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from llmkit.cli.packages import installed_version
from llmkit.version import __version__

_PACKAGES = ("torch", "transformers", "safetensors", "lm-eval", "typer", "rich", "numpy")


def write_crash_file(args: Sequence[str], error: BaseException) -> Path | None:
    """Write command line, versions and stack to the temporary folder; None when even that fails."""
    lines = [
        f"time      {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
        f"command   {shlex.join(['llmkit', *args])}",
        f"llmkit    {__version__}",
        f"python    {platform.python_version()} on {platform.platform()}",
        *(f"{name:<9} {installed_version(name) or 'absent'}" for name in _PACKAGES),
        "",
        "".join(traceback.format_exception(error)),
    ]
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="llmkit-crash-", suffix=".txt", delete=False
        ) as file:
            file.write("\n".join(lines))
            return Path(file.name)
    except OSError:
        return None
