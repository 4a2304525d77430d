"""The text that a model is calibrated on, and the windows of tokens that are cut from it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from llmkit.architecture.prompts import ChatTemplate, Message, Prompt
from llmkit.errors import InputError
from llmkit.formats import text_file
from llmkit.tokenization.chat import encode_chat

Document = str | tuple[Message, ...]
"""A text as it is, or a conversation, which goes through the chat format of the model."""

_OWN = "own_text.txt"
_LEAST_CHARACTERS = 500
_HINT = "give a text of some pages in UTF-8"
_SUFFIXES = (".jsonl", ".md", ".txt")
_FORMS = '{"text": …}, {"prompt": …, "completion": …} or {"messages": [{"role": …, "content": …}, …]}'


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A text to calibrate on.

    Attributes:
        label: how notes call it.
        documents: its parts, in order.
    """

    label: str
    documents: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """Tells texts apart in a plan, and is recorded: SHA-256 of the text (of conversations, of their JSON)."""
        hasher = hashlib.sha256()
        for document in self.documents:
            turns = document if isinstance(document, str) else json.dumps([[m.role, m.content] for m in document])
            hasher.update(turns.encode())
        return hasher.hexdigest()

    @property
    def n_characters(self) -> int:
        """Of all documents."""
        return sum(len(d) if isinstance(d, str) else sum(len(m.content) for m in d) for d in self.documents)

    @property
    def has_conversations(self) -> bool:
        """Whether a chat format is needed."""
        return any(not isinstance(document, str) for document in self.documents)


def own_text() -> CalibrationText:
    """The text that llmkit brings: prose, conversations, code, sums and tables, in eleven languages."""
    content = resources.files("llmkit.calibration").joinpath(_OWN).read_text(encoding="utf-8")
    return CalibrationText("llmkit's own text", (content,))


def read_text(path: Path) -> CalibrationText:
    """The text of a file, of a file of JSON lines (`.jsonl`), or of all such files of a folder in order of names.

    Raises:
        InputError: there is no such file, it is no text, a line has none of the known forms, or all of it is too short
            to tell anything from.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        if not files:
            raise InputError(
                f"{path} has no {', '.join(_SUFFIXES)} files", hint="give a text file, or a folder of some"
            )
    else:
        files = [path]
    documents = [document for file in files for document in _documents(file)]
    text = CalibrationText(path.name, tuple(documents))
    if text.n_characters < _LEAST_CHARACTERS:
        raise InputError(
            f"{path} has {text.n_characters} characters, too few to calibrate on; at least {_LEAST_CHARACTERS}",
            hint=_HINT,
        )
    return text


def _documents(path: Path) -> Iterator[Document]:
    content = text_file.read_text(path, hint=_HINT)
    if path.suffix != ".jsonl":
        yield content.strip()
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield _document(json.loads(line))
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: expected {_FORMS}", hint="one JSON object a line") from error


def _document(record: Mapping[str, Any]) -> Document:
    """The document of one JSON line.

    Raises:
        KeyError, TypeError, ValueError: it has none of the known forms.
    """
    if "messages" in record:
        turns = [(_text(m["role"]), _text(m["content"])) for m in record["messages"]]
    elif "prompt" in record:
        turns = [("user", _text(record["prompt"])), ("assistant", _text(record["completion"]))]
    else:
        return _text(record["text"])
    if not turns or any(role not in ("system", "user", "assistant") for role, _ in turns):
        raise ValueError("no turns, or of nobody known")
    return tuple(Message(role, content) for role, content in turns)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def token_ids(text: CalibrationText, tokenizer: Any, prompt: Prompt | None = None) -> list[int]:
    """All tokens of a text.

    Args:
        prompt: the format of conversations; the tokenizer's own template when not given.

    Raises:
        InputError: the format has no place for the turns of a conversation.
    """
    ids: list[int] = []
    for document in text.documents:
        if isinstance(document, str):
            ids += tokenizer(document, verbose=False)["input_ids"]
            continue
        # As it stands after the model has answered: a format begins an answer after the last question.
        is_answered = document[-1].role == "assistant"
        question = document[:-1] if is_answered else document
        ids += encode_chat(tokenizer, prompt or ChatTemplate(), question)
        if is_answered:
            ids += tokenizer(document[-1].content, verbose=False, add_special_tokens=False)["input_ids"]
    return ids


def windows(
    ids: Sequence[int], length: int, *, samples: int | None = None, seed: int = 0, suffix: Sequence[int] = ()
) -> list[list[int]]:
    """Windows of `length` tokens that do not overlap, in the order of the text; what is over at its end is left out.

    Args:
        ids: tokens of the whole text.
        length: of a window, what every prompt ends with included; a shorter text is one window.
        samples: so many of them, chosen at random; None for all.
        suffix: ids that every prompt ends with.
    """
    ids = [i for i in ids if i not in suffix]
    length = min(length - len(suffix), len(ids))
    starts: Sequence[int] = range(0, len(ids) - length + 1, length)
    if samples is not None and samples < len(starts):
        starts = sorted(random.Random(seed).sample(starts, samples))
    return [[*ids[start : start + length], *suffix] for start in starts]
