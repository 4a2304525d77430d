"""Conversations from the command line: a prompt, a system message, a file of messages; and prompts shown in tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.output import Output
from llmkit.errors import InputError
from llmkit.formats.json_text import parse_json

if TYPE_CHECKING:
    from llmkit.architecture.prompts import Message

_FORM = 'a message is {"role": "user", "content": "…"}; a file has a list of them, or one on each line'
_ROLES = ("system", "user", "assistant")


def read_conversation(prompt: str | None, system: str | None, file: Path | None) -> list[Message]:
    """The messages: the system message, those of the file, and the prompt as the last question.

    Args:
        prompt: a question; `-` reads it from stdin; None where the file ends with one.
        system: the system message, which a file must then not have.
        file: JSON (a list of {"role", "content"}, or an object with such `messages`) or JSON lines of them.

    Raises:
        InputError: nothing to answer, a file that cannot be read, or two system messages.
    """
    from llmkit.architecture.prompts import Message

    messages = [] if file is None else _read(file)
    if system is not None:
        if any(m.role == "system" for m in messages):
            raise InputError(f"{file} has a system message, and --system gives another", hint="leave one of them out")
        messages.insert(0, Message("system", system))
    if prompt is not None:
        messages.append(Message("user", _stdin() if prompt == "-" else prompt))
    if not messages or messages[-1].role != "user":
        last = f"the last message of {file} is the {messages[-1].role}'s" if file and messages else "no prompt"
        raise InputError(f"nothing to answer: {last}", hint="give a PROMPT (or - for stdin), or --messages FILE")
    return messages


def _stdin() -> str:
    from llmkit.formats.text_file import decoded

    raw = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if raw is None else decoded(raw.read(), "stdin")


def _read(file: Path) -> list[Message]:
    from llmkit.architecture.prompts import Message
    from llmkit.formats.text_file import read_text

    text = read_text(file)
    messages = []
    for i, entry in enumerate(_entries(file, text), 1):
        role = entry.get("role") if isinstance(entry, dict) else None
        content = entry.get("content") if isinstance(entry, dict) else None
        if role not in _ROLES or not isinstance(content, str):
            shown = json.dumps(entry, ensure_ascii=False)[:60]
            raise InputError(
                f"{file}, message {i}: expected a role ({', '.join(_ROLES)}) and a content of text, found {shown}",
                hint=_FORM,
            )
        messages.append(Message(str(role), content))
    return messages


def _entries(file: Path, text: str) -> list[Any]:
    try:
        data = parse_json(text, str(file))
    except InputError as error:
        if not isinstance(error.__cause__, json.JSONDecodeError):
            raise
        return [_line(file, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if isinstance(data, dict):
        data = data.get("messages", [data])
    if not isinstance(data, list):
        raise InputError(
            f"{file}: expected a list of messages, found {type(data).__name__}",
            hint=_FORM,
        )
    return data


def _line(file: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line, f"{file}, line {number}")
    except InputError as error:
        raise InputError(error.message, hint=_FORM) from error


def show_prompt(out: Output, tokenizer: Any, ids: list[int]) -> None:
    """The exact tokens of a prompt, and the text that they stand for."""
    from llmkit.tokenization.chat import token_names

    names = token_names(tokenizer, ids)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    document = {"text": text, "n_prompt_tokens": len(ids), "tokens": ids, "token_names": names}

    def render() -> None:
        out.table(["token", "id"], [(json.dumps(n, ensure_ascii=False), i) for n, i in zip(names, ids, strict=True)],
                  right=["id"])  # fmt: skip
        out.line()
        out.line(f"{len(ids)} tokens: {json.dumps(text, ensure_ascii=False)}")

    out.answer(document, render, brief=" ".join(map(str, ids)))
