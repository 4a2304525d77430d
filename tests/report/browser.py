"""Headless Chromium through the DevTools protocol over two pipes: no driver, no port, one process for all tests."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--force-color-profile=srgb", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
DECODE = """(async () => {
  const bytes = Uint8Array.from(atob('PNG'), c => c.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes], {type: 'image/png'}));
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, image.width, image.height).data, reader = new FileReader();
  await new Promise(done => { reader.onload = done; reader.readAsDataURL(new Blob([data])) });
  return [image.width, image.height, reader.result.split(',')[1]] })()"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def executable() -> str | None:
    """The browser that is installed; LLMKIT_CHROMIUM names another."""
    return os.environ.get("LLMKIT_CHROMIUM") or next((p for p in map(shutil.which, NAMES) if p), None)


class Browser:
    """One page of a running browser."""

    def __init__(self, program: str, profile: Path) -> None:
        (child_in, self._to), (self._from, child_out) = os.pipe(), os.pipe()

        def place() -> None:  # the protocol's pipes are file descriptors 3 and 4
            a, b = os.dup(child_in), os.dup(child_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(child_in)
        os.close(child_out)
        self._n, self._session, self._rest = 0, "", b""
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        first = next(t["targetId"] for t in targets if t["type"] == "page")
        second = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._decoder, self._session = (
            self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"] for target in (second, first)
        )
        self.call("Target.activateTarget", targetId=first)
        self.call("Page.enable")
        self.call("Network.enable")
        self.call("Log.enable")

    def close(self) -> None:
        for end in (self._to, self._from):
            os.close(end)
        self.process.kill()
        self.process.wait()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call of the protocol; events that come meanwhile are kept."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": params} | (
            {"sessionId": self._session} if self._session else {}
        )
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._n:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + 30
        while b"\0" not in self._rest:
            if not select.select([self._from], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._from, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path, width: int, height: int, *, scheme: str = "light", scripts: bool = True) -> None:
        """Load a file in a window of this size, and wait until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:500])
        return result["result"].get("value")

    def screenshot(self, session: str | None = None, **options: Any) -> bytes:
        """A PNG of the window, or of the whole page (captureBeyondViewport=True)."""
        before, self._session = self._session, session or self._session
        try:
            return base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"])
        finally:
            self._session = before

    def pixels(self):
        """What the window shows, as an array [height, width, 3] of bytes. The browser itself decodes its PNG."""
        import numpy as np

        page, self._session = self._session, self._decoder
        try:
            width, height, data = self.evaluate(DECODE.replace("PNG", base64.b64encode(self.screenshot(page)).decode()))
        finally:
            self._session = page
        return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[..., :3]

    def pdf(self) -> bytes:
        """The page as it is printed, on A4."""
        answer = self.call(
            "Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=False, printBackground=False
        )
        return base64.b64decode(answer["data"])

    @property
    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]


@contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    page = Browser(program, profile)
    try:
        yield page
    finally:
        page.close()
