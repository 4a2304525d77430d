"""The command line: parse, call, render."""

import sys

if sys.platform == "win32":  # no fcntl, no flock, no rename that replaces nothing
    sys.stderr.write("error: llmkit runs on Linux and macOS\nhint: on Windows use it inside WSL (wsl --install)\n")
    sys.exit(2)
