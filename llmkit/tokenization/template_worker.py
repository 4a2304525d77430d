"""The process in which chat templates are rendered; started by `llmkit.tokenization.templates`.

A template is a program that came with a file. Jinja's sandbox holds back what it reaches, not what it uses, so it runs
where the operating system counts its time and memory. Rendered is with transformers' own environment.

Protocol, on stdin and stdout: 4 bytes of length (big endian), then JSON. A request has `seconds`, `memory_bytes`,
`output_chars`, `arguments`; the answer `text`, or `error` with `kind` (`template`, `budget`, `other`) and `message`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_LENGTH = 4


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message."""
    data = json.dumps(message).encode()  # ASCII: lone surrogates travel, too
    stream.write(len(data).to_bytes(_LENGTH, "big") + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message; None at the end of the stream."""
    head = stream.read(_LENGTH)
    if len(head) < _LENGTH:
        return None
    data = stream.read(int.from_bytes(head, "big"))
    return json.loads(data)


@contextlib.contextmanager
def _limits(seconds: float, memory_bytes: int) -> Iterator[None]:
    """Processor time and address space that may be used beyond what is used already."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    stop = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    hard_time, hard_space = resource.getrlimit(resource.RLIMIT_CPU)[1], resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (stop, hard_time))
    status = Path("/proc/self/statm")
    if status.is_file():  # elsewhere the time alone is bounded
        held = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory_bytes, hard_space))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard_space, hard_space))


def _answer(request: Any) -> dict[str, Any]:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        with _limits(request["seconds"], request["memory_bytes"]):
            text = render_jinja_template(**request["arguments"])[0][0]
            if len(text) <= request["output_chars"]:
                return {"text": text}
            return {"error": "budget", "message": f"it writes {len(text)} characters"}
    except MemoryError:
        return {"error": "budget", "message": "it takes more memory"}
    except TemplateError as error:
        return {"error": "template", "message": str(error)[:500] or type(error).__name__}
    except Exception as error:  # noqa: BLE001  # whatever a template raises is the template's fault
        return {"error": "other", "message": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    """Answer until stdin ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and closes stdin
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    import transformers.utils.chat_template_utils  # noqa: F401  # before the first limits are set

    while (request := receive(source)) is not None:
        send(target, _answer(request))


if __name__ == "__main__":
    main()
