"""The picture of the report in the guide, made anew: `python tests/report/picture.py docs/guides/report.png`.

Scores the mini model before and after an int3 quantization on the mini benchmark, writes the page, and photographs it
in Chromium at the width of a desktop and of a phone.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from browser import browser, executable

from llmkit.cli.app import main

MINI = Path(str(files("llmkit_evalsets"))) / "mini"
DESK, PHONE, HEIGHT = 900, 360, 980
SIDES = """<body style="margin:0;display:flex;gap:16px;padding:16px;background:#8b949e;width:max-content">%s</body>"""


def make_page(folder: Path) -> Path:
    """The page of two runs and of the quantization between them, by the commands of the guide."""
    tuned, small, page = folder / "mini", folder / "mini-int3", folder / "report.html"
    text = str(MINI / "text.txt")
    calls = [
        ["delta", "apply", MINI / "base", MINI / "delta", "-o", tuned],
        ["quantize", tuned, "--bits", "3", "--group-size", "64", "--method", "rtn", "--evaluate", text, "-o", small],
        *(["eval", m, "--bench", "mini", "--log-samples", "-o", folder / f"{m.name}.json"] for m in (tuned, small)),
        ["report", folder / f"{tuned.name}.json", folder / f"{small.name}.json", "-o", page],
    ]
    for call in calls:
        code = main([*map(str, call), "-q"])
        assert code == 0, call
    return page


def photograph(page: Path, picture: Path, scratch: Path) -> None:
    """The top of the page at two widths, side by side."""
    program = executable()
    assert program is not None, "no Chromium"
    with browser(program, scratch / "profile") as opened:
        shots = []
        for width, section in ((DESK, "summary"), (PHONE, "accuracy")):
            opened.open(page, width, HEIGHT)
            opened.evaluate(f"document.querySelector('#{section} h2').scrollIntoView()")
            shots.append(base64.b64encode(opened.screenshot()).decode())
        images = "".join(f'<img src="data:image/png;base64,{shot}">' for shot in shots)
        (scratch / "sides.html").write_text(f"<!doctype html>{SIDES % images}")
        opened.open(scratch / "sides.html", DESK + PHONE + 48, HEIGHT + 32)
        picture.write_bytes(opened.screenshot())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        photograph(make_page(Path(name)), Path(sys.argv[1]), Path(name))
