"""Prompt formats as data: how one question, or a conversation, becomes the text that a tuned model expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.errors import InputError, nearest

__all__ = ["FORMATS", "ChatTemplate", "Instruction", "Message", "Prompt", "Raw", "Turns", "choose_prompt"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: role `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Raw:
    """The question as it is."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template that the checkpoint's own tokenizer files carry."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """A format for one instruction without history.

    Attributes:
        plain: the text with `{question}`.
        with_input: the text with `{question}` and `{input}`, for instructions that come with material.
    """

    plain: str
    with_input: str

    def render(self, question: str, input_text: str = "") -> str:
        """The prompt of one instruction."""
        if input_text:
            return _filled(self.with_input, question=question, input=input_text)
        return _filled(self.plain, question=question)


@dataclass(frozen=True, slots=True)
class Turns:
    """A format for conversations.

    Attributes:
        system: put before the first turn, with `{system}`; empty text when there is no system message.
        default_system: the system message when the conversation has none; None for no system text at all.
        user: a question, with `{question}`; it ends where the answer starts.
        assistant: an answer of the history, with `{answer}`.
        user_again: a later question; None for the same as `user`.
        system_goes_inside: the system text is part of the first question instead of before it.
    """

    system: str
    default_system: str | None
    user: str
    assistant: str
    user_again: str | None = None
    system_goes_inside: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation that ends with a question; the model continues it.

        Raises:
            InputError: roles that do not alternate user, assistant, …, user.
        """
        system = self.default_system
        turns = list(messages)
        if turns and turns[0].role == "system":
            system = turns.pop(0).content
        head = _filled(self.system, system=system) if system is not None else ""
        wanted = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
        if not turns or [m.role for m in turns] != wanted or len(turns) % 2 == 0:
            raise InputError(
                f"this prompt format needs turns user, assistant, …, user; found {', '.join(m.role for m in messages)}"
            )
        text = "" if self.system_goes_inside else head
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                text += _filled(self.assistant, answer=turn.content)
                continue
            question = head + turn.content if self.system_goes_inside and i == 0 else turn.content
            template = self.user if i == 0 or self.user_again is None else self.user_again
            text += _filled(template, question=question)
        return text


Prompt = Raw | ChatTemplate | Instruction | Turns

_ALPACA = "Below is an instruction that describes a task"
_ASK = "Write a response that appropriately completes the request."

FORMATS: dict[str, Prompt] = {
    "raw": Raw(),
    "chat-template": ChatTemplate(),
    # Stanford Alpaca, train.py: PROMPT_DICT
    "alpaca": Instruction(
        plain=f"{_ALPACA}. {_ASK}\n\n### Instruction:\n{{question}}\n\n### Response:",
        with_input=(
            f"{_ALPACA}, paired with an input that provides further context. {_ASK}\n\n"
            "### Instruction:\n{question}\n\n### Input:\n{input}\n\n### Response:"
        ),
    ),
    # FastChat, conversation.py: vicuna_v1.1 (v1.1 to v1.5)
    "vicuna": Turns(
        system="{system} ",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        user="USER: {question} ASSISTANT:",
        assistant=" {answer}</s>",
    ),
    # Meta, llama/generation.py: chat_completion; the first <s> is the tokenizer's
    "llama-2-chat": Turns(
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        default_system=None,
        user="[INST] {question} [/INST]",
        assistant=" {answer} </s>",
        user_again="<s>[INST] {question} [/INST]",
        system_goes_inside=True,
    ),
}


def choose_prompt(name: str | None, *, has_chat_template: bool, family: Prompt | None = None) -> Prompt:
    """The format to use: the one asked for, else the checkpoint's own template, else the family's, else raw text.

    Raises:
        InputError: no format of that name, or a chat template is asked for and the checkpoint has none.
    """
    if name is None:
        return ChatTemplate() if has_chat_template else (family or Raw())
    if name not in FORMATS:
        guess = nearest(name, FORMATS)
        raise InputError(
            f"unknown prompt format {name!r}",
            hint=f"did you mean {guess}?" if guess else f"one of {', '.join(FORMATS)}",
        )
    if isinstance(FORMATS[name], ChatTemplate) and not has_chat_template:
        raise InputError(
            "this checkpoint has no chat template", hint="use --format raw, or another format: " + ", ".join(FORMATS)
        )
    return FORMATS[name]


def _filled(template: str, **values: str) -> str:
    """`template` with `{name}` replaced; braces inside the values stay as they are."""
    for key, value in values.items():
        before, mark, after = template.partition("{" + key + "}")
        template = before + value + after if mark else template
    return template
