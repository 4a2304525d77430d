"""Chat templates, rendered by transformers' rules within a budget.

A template is a program out of a file: it may loop for ever, fill the memory with a few letters, or fail with any error.
It runs in a process of its own (`template_worker`), which costs half a second once. For n bytes of template and
conversation it may take

    2 s of processor time and 1 s more for each 100 kB · 256 MiB of memory and 64 n · 2^20 + 16 n characters of text

which is a hundred times what published templates take.
"""

from __future__ import annotations

import atexit
import functools
import json
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from llmkit.errors import InputError
from llmkit.tokenization import template_worker

_HINT = "choose another format by its name: raw, alpaca, vicuna, …"
_WAIT_S = 60.0  # beyond the processor time: a machine may be busy


class TemplateRefusal(InputError):
    """The template itself refuses the conversation (`raise_exception`), or is no template."""


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """A conversation as the tokenizer's own chat template writes it: the text of transformers' `apply_chat_template`.

    Args:
        messages: `role` and `content` of each.
        add_generation_prompt: begin the answer.
        continue_final_message: end within the last message.
        variables: more that the template can read.

    Raises:
        TemplateRefusal: the template raises an error of its own.
        InputError: there is none, it fails, or it goes beyond its budget.
    """
    template = _template_of(tokenizer)
    arguments = {
        "conversations": [[{k: v for k, v in m.items() if v is not None} for m in messages]],
        "chat_template": template,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        **tokenizer.special_tokens_map,
        **variables,
    }
    plain = json.dumps(arguments, default=str)
    n = len(plain)
    request = {
        "seconds": 2 + n / 100_000,
        "memory_bytes": (256 << 20) + 64 * n,
        "output_chars": (1 << 20) + 16 * n,
        "arguments": json.loads(plain),
    }
    answer = _Worker.current().ask(request)
    if answer is None:
        answer = {"error": "budget", "message": "it takes more time or memory"}
    if "text" in answer:
        return str(answer["text"])
    if answer["error"] == "template":
        raise TemplateRefusal(f"the chat template refuses this conversation: {answer['message']}", hint=_HINT)
    if answer["error"] == "other":
        raise InputError(f"the chat template fails: {answer['message']}", hint=_HINT)
    budget = f"{request['seconds']:.0f} s, {request['memory_bytes'] >> 20} MiB, {request['output_chars']} characters"
    raise InputError(f"the chat template goes beyond its budget ({budget}): {answer['message']}", hint=_HINT)


def _template_of(tokenizer: Any) -> str:
    """The template, or the one called `default` of several."""
    stated = tokenizer.chat_template
    if isinstance(stated, Mapping):
        stated = stated.get("default")
        if stated is None:
            raise InputError("none of the tokenizer's chat templates is called `default`", hint=_HINT)
    if not stated:
        raise InputError(
            f"{getattr(tokenizer, 'name_or_path', '') or 'the tokenizer'} has no chat template", hint=_HINT
        )
    if not isinstance(stated, str):
        raise InputError(f"the chat template is no text but {type(stated).__name__}: {str(stated)[:40]}", hint=_HINT)
    return stated


class _Worker:
    """The process that renders; it ends with this one, when it is closed, or when a template exceeds its limits."""

    def __init__(self) -> None:
        # -P: neither the folder of the script nor the current one serves modules
        command = [sys.executable, "-P", str(Path(template_worker.__file__))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        atexit.register(self.close)

    @classmethod
    def current(cls) -> _Worker:
        """The one that runs, else a new one."""
        worker = _started()
        if worker._process.poll() is not None:
            worker.close()
            _started.cache_clear()
            worker = _started()
        return worker

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The answer; None where the process ended or did not answer in time."""
        questions, answers = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        try:
            template_worker.send(questions, request)
            ready, _, _ = select.select([answers], [], [], _WAIT_S + 10 * request["seconds"])
            answer = template_worker.receive(answers) if ready else None
        except (OSError, ValueError):
            answer = None
        except BaseException:  # interrupted half-way: what it would answer next belongs to this question
            self.close()
            raise
        if answer is None:
            self.close()
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        atexit.unregister(self.close)


@functools.cache
def _started() -> _Worker:
    return _Worker()
