"""Prompt formats applied with a tokenizer: pieces to ids, and what ends an answer, by id and by text.

Text of people and special tokens never mix: each text is encoded on its own with special tokens off, each token is
looked up by its name. Where a prompt has to travel through a program as one string (lm-eval's), the tokens travel in
it as noncharacters of Unicode, which are there for such use and which no text may contain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.architecture.prompt_kinds import NO_FINISH, Cut, Finish
from llmkit.architecture.prompts import ChatTemplate, Message, Piece, Prompt, Token, Turns, choose_prompt
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError
from llmkit.tokenization.templates import render

_OPEN, _CLOSE, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}|{_BREAK}")


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends an answer.

    Attributes:
        texts: the first of these that occurs is cut off, with all after it.
        ids: a token that is one of these ends it.
        finish: what is done to the text before it is shown.
    """

    texts: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    finish: Finish = NO_FINISH


def prompt_of(ckpt: Checkpoint, tokenizer: Any, name: str | None = None) -> Prompt:
    """The format of a checkpoint: the one named, else its own chat template, else its family's, else raw text.

    Raises:
        InputError: no format of that name.
        PluginError: two plugins claim the checkpoint.
    """
    return choose_prompt(
        name,
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        family=ckpt.architecture.prompt_of(ckpt.config) if ckpt.architecture is not None else None,
    )


def token_id(tokenizer: Any, token: Token) -> int | None:
    """The id of a special token; None if the tokenizer does not have it."""
    if token.id is not None:
        return token.id if token.id < len(tokenizer) else None
    i = tokenizer.convert_tokens_to_ids(token.text)
    if i is None or tokenizer.convert_ids_to_tokens(i) != token.text:
        return None
    return int(i)


def encode_pieces(tokenizer: Any, pieces: Sequence[Piece]) -> list[int]:
    """The ids of a prompt's pieces, with what the tokenizer puts around every text.

    Raises:
        InputError: the tokenizer has not one of the tokens.
    """
    ids: list[int] = []
    for piece in pieces:
        ids += [_required(tokenizer, piece)] if isinstance(piece, Token) else _encode_text(tokenizer, piece)
    return _surrounded(tokenizer, ids)


def encode_chat(tokenizer: Any, prompt: Prompt, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation in a format, up to where the model begins its answer.

    Raises:
        InputError: the format has no place for these messages, or the tokenizer has not its tokens.
    """
    if isinstance(prompt, ChatTemplate):
        written = apply_template(tokenizer, messages)
        # the template writes the special tokens itself
        return list(tokenizer(written, add_special_tokens=False, split_special_tokens=False)["input_ids"])
    return encode_pieces(tokenizer, prompt.pieces(messages))


def apply_template(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The conversation as the checkpoint's own template writes it.

    Raises:
        InputError: the template refuses it, fails, or goes beyond its budget.
    """
    return render(tokenizer, [{"role": m.role, "content": m.content} for m in messages])


def ending_of(tokenizer: Any, prompt: Prompt) -> Ending:
    """What ends an answer in a format, besides the model's end tokens."""
    ids = [token_id(tokenizer, s) for s in prompt.stops if isinstance(s, Token)]
    texts = tuple(s for s in prompt.stops if isinstance(s, str))
    finish = prompt.finish if isinstance(prompt, Turns) else NO_FINISH
    return Ending(texts, tuple(i for i in ids if i is not None), finish)


def token_names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as the vocabulary spells it."""
    return [str(name) for name in tokenizer.convert_ids_to_tokens(list(ids))]


def marked_text(tokenizer: Any, pieces: Sequence[Piece]) -> str:
    """A prompt as one string, in which the tokens are marks that only `encode_marked` reads.

    Raises:
        InputError: the tokenizer has not one of the tokens, or a text has a noncharacter that is a mark.
    """
    parts: list[str] = []
    for i, piece in enumerate(pieces):
        if isinstance(piece, Token):
            parts.append(f"{_OPEN}{_required(tokenizer, piece)}{_CLOSE}")
            continue
        if any(mark in piece for mark in (_OPEN, _CLOSE, _BREAK)):
            raise InputError("a text has the noncharacters U+FDD0 to U+FDD2, which no text may have")
        parts.append((_BREAK if i and isinstance(pieces[i - 1], str) else "") + piece)
    # the first mark says that the special tokens of this text are all there or are marks
    return "".join(parts) if is_marked("".join(parts)) else _BREAK + "".join(parts)


def marked_answer_prefix(tokenizer: Any, prompt: Prompt | None) -> str:
    """What follows a prompt before the text of its answer (`Turns.answer_prefix`), in the marks of `marked_text`."""
    parts = prompt.answer_prefix if isinstance(prompt, Turns) else ()
    return "".join(
        part if isinstance(part, str) else _BREAK if isinstance(part, Cut) else marked_text(tokenizer, [part])
        for part in parts
    )


def is_marked(text: str) -> bool:
    """Whether a text has marks."""
    return any(mark in text for mark in (_OPEN, _BREAK))


def encode_marked(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The ids of a marked text."""
    ids: list[int] = []
    start = 0
    for match in _MARK.finditer(text):
        ids += _encode_text(tokenizer, text[start : match.start()])
        ids += [int(match[1])] if match[1] else []
        start = match.end()
    ids += _encode_text(tokenizer, text[start:])
    return _surrounded(tokenizer, ids) if add_special_tokens else ids


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def _required(tokenizer: Any, token: Token) -> int:
    i = token_id(tokenizer, token)
    if i is None:
        raise InputError(
            f"the prompt format is made of the token {token.text}, which this tokenizer has not",
            hint="choose another format, or `--chat-template raw`",
        )
    return i


def _surrounded(tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids with the special tokens that the tokenizer puts around a text, found by encoding one letter."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    surrounded = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for start in range(len(surrounded) - len(bare) + 1):
        if surrounded[start : start + len(bare)] == bare:
            return surrounded[:start] + ids + surrounded[start + len(bare) :]
    return ids
