"""The kinds of prompt format: how a question, or a conversation, becomes the pieces that a tuned model expects.

A prompt is made of pieces, not of one string: text, which is encoded as it is, and special tokens, which are named and
never looked for in text. So a question that spells `</s>` or `<|user|>` stays a text of a few ordinary tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmkit.errors import InputError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: role `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Token:
    """A special token of a format.

    Attributes:
        text: its string, by which the tokenizer's vocabulary has it.
        id: its id, where a release fixes that and tokenizers do not agree on the string; it wins over the string.
    """

    text: str
    id: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """A place in a template: the texts before and after it are encoded apart, each as the beginning of a text."""


CUT = Cut()
Piece = str | Token  # neighbouring texts are encoded apart
Template = str | tuple[str | Token | Cut, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """What the reference implementation makes of the text of an answer before it is shown.

    Attributes:
        rules: regular expressions and what they are replaced by, in order.
        unsettled: matches the end of an unfinished text that more text could change.
    """

    rules: tuple[tuple[str, str], ...] = ()
    unsettled: str = r"(?!)"

    def apply(self, text: str) -> str:
        """The finished text."""
        for pattern, replacement in self.rules:
            text = re.sub(pattern, replacement, text)
        return text

    def settled(self, text: str) -> str:
        """The text without an end that may still change."""
        match = re.search(f"(?:{self.unsettled})$", text)
        return text[: match.start()] if match else text


NO_FINISH = Finish()


@dataclass(frozen=True, slots=True)
class Raw:
    """The question as it is."""

    stops: tuple[Piece, ...] = ()

    def pieces(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """The one question.

        Raises:
            InputError: it is a conversation.
        """
        return (_only_question(messages, "raw text"),)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template that the checkpoint's own tokenizer files carry."""

    stops: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Instruction:
    """A format for one instruction without history.

    Attributes:
        plain: the text with `{question}`.
        with_input: the text with `{question}` and `{input}`, for instructions that come with material.
        stops: texts and tokens that end the answer, besides the tokenizer's end token.
    """

    plain: str
    with_input: str
    stops: tuple[Piece, ...] = ()

    def render(self, question: str, input_text: str = "") -> str:
        """The prompt of one instruction."""
        if input_text:
            return _filled(self.with_input, question=question, input=input_text)
        return _filled(self.plain, question=question)

    def pieces(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """The prompt of one instruction.

        Raises:
            InputError: it is a conversation.
        """
        return (self.render(_only_question(messages, "this prompt format")),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """A format for conversations. A template is text, or texts and tokens in their order.

    Attributes:
        user: a question, with `{question}` and `{round}`; it ends where the answer starts.
        assistant: an answer of the history, with `{answer}`.
        system: put before the first turn, with `{system}`; None where the format has no place for it.
        default_system: the system message when the conversation has none; None for no system text at all.
        user_again: a later question; None for the same as `user`.
        lone_user: the question of a conversation that is nothing else; None for the same as `user`.
        system_goes_inside: the system text is part of the first question instead of before it.
        first_round: the number of the first question.
        joins_paragraphs: an empty line inside a message would end it, so it is taken out.
        stops: texts and tokens that end the answer, besides the tokenizer's end token.
        finish: what is done to the text of an answer.
    """

    user: Template
    assistant: Template
    system: Template | None = None
    default_system: str | None = None
    user_again: Template | None = None
    lone_user: Template | None = None
    system_goes_inside: bool = False
    first_round: int = 0
    joins_paragraphs: bool = False
    stops: tuple[Piece, ...] = ()
    finish: Finish = NO_FINISH

    def pieces(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """The pieces of a conversation that ends with a question; the model continues it.

        Raises:
            InputError: roles that do not alternate user, assistant, …, user, or a system message without a place.
        """
        system, turns = self._split(messages)
        writer = _Writer()
        head = ""
        if system is not None and self.system is not None:
            if self.system_goes_inside and isinstance(self.system, str):
                head = _filled(self.system, system=system)
            else:
                writer.write(self.system, system=system)
        for i, turn in enumerate(turns):
            content = _joined(turn.content) if self.joins_paragraphs else turn.content
            if turn.role == "assistant":
                writer.write(self.assistant, answer=content)
                continue
            template = self.user if i == 0 or self.user_again is None else self.user_again
            if self.lone_user is not None and len(messages) == 1:
                template = self.lone_user
            question = head + content if i == 0 else content
            writer.write(template, round=str(self.first_round + i // 2), question=question)
        return writer.pieces()

    def render(self, messages: Sequence[Message]) -> str:
        """The same as one text, tokens as their strings."""
        return text_of(self.pieces(messages))

    @property
    def answer_prefix(self) -> tuple[str | Token | Cut, ...]:
        """What stands between a question and the text of its answer: a space, mostly, which the model writes first."""
        parts = (self.assistant,) if isinstance(self.assistant, str) else self.assistant
        pieces_before: list[str | Token | Cut] = []
        for part in parts:
            before, mark, _ = part.partition("{answer}") if isinstance(part, str) else (part, "", "")
            pieces_before += [before] if before != "" else []
            if mark:
                break
        return tuple(pieces_before)

    def _split(self, messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
        system, turns = self.default_system, list(messages)
        if turns and turns[0].role == "system":
            system = turns.pop(0).content
            if self.system is None:
                raise InputError(
                    "this prompt format has no place for a system message", hint="put it into the first question"
                )
        wanted = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
        if not turns or [m.role for m in turns] != wanted or len(turns) % 2 == 0:
            roles = ", ".join(m.role for m in messages) or "no messages"
            raise InputError(f"this prompt format needs turns user, assistant, …, user; found {roles}")
        return system, turns


Prompt = Raw | ChatTemplate | Instruction | Turns


def text_of(pieces: Sequence[Piece]) -> str:
    """Pieces as one text, tokens as their strings: for people to read, and to compare with formats that are text."""
    return "".join(p if isinstance(p, str) else p.text for p in pieces)


@dataclass(slots=True)
class _Writer:
    """Collects pieces; text joins the text before it unless a token or a cut is between them."""

    _made: list[str | Token | Cut] = field(default_factory=list)

    def write(self, template: Template, **values: str) -> None:
        for part in (template,) if isinstance(template, str) else template:
            if not isinstance(part, str):
                self._made.append(part)
                continue
            last = self._made[-1] if self._made else None
            text = _filled(part, **values)
            if isinstance(last, str):
                self._made[-1] = last + text
            else:
                self._made.append(text)

    def pieces(self) -> tuple[Piece, ...]:
        return tuple(p for p in self._made if not isinstance(p, Cut) and p != "")


def _only_question(messages: Sequence[Message], what: str) -> str:
    if [m.role for m in messages] != ["user"]:
        roles = ", ".join(m.role for m in messages) or "no messages"
        raise InputError(
            f"{what} takes one question and no history; found {roles}", hint="choose a format for conversations"
        )
    return messages[0].content


def _joined(text: str) -> str:
    """Without empty lines, as the reference implementation takes them out: once over, pairs of newlines become one."""
    return text.replace("\r\n", "\n").replace("\n\n", "\n")


def _filled(template: str, **values: str) -> str:
    """`template` with `{name}` replaced; braces inside the values stay as they are."""
    for key, value in values.items():
        before, mark, after = template.partition("{" + key + "}")
        template = before + value + after if mark else template
    return template
