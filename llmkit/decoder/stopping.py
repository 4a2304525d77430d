"""Text as its tokens arrive, up to the first stop text; nothing is given out that a later token could change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmkit.architecture.prompt_kinds import NO_FINISH, Finish


class TextStream:
    """The text of tokens that arrive one by one.

    Args:
        decode: token ids -> text.
        stops: texts that end it; the first that occurs is cut off.
        finish: what is done to the text.

    Attributes:
        ids: the tokens so far.
        is_stopped: a stop text has occurred.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), finish: Finish = NO_FINISH
    ) -> None:
        self._decode = decode
        self._finish = finish
        self._stops = tuple(s for s in stops if s)
        self._given = 0
        self.ids: list[int] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """The whole text, finished, without a stop text and what follows it."""
        decoded = self._decode(self.ids)
        places = [at for stop in self._stops if (at := decoded.find(stop)) >= 0]
        return self._finish.apply(decoded[: min(places)] if places else decoded)

    def push(self, token: int) -> str:
        """Take a token; give the text that is certain now and was not given before."""
        self.ids.append(token)
        decoded = self._decode(self.ids)
        places = [at for stop in self._stops if (at := decoded.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return self._give(self._finish.apply(decoded[: min(places)]))
        if decoded.endswith("\ufffd"):
            return ""  # the beginning of a character
        settled = self._finish.settled(decoded[: len(decoded) - self._pending(decoded)])
        return self._give(self._finish.apply(settled))

    def rest(self) -> str:
        """The remaining text, once there are no more tokens."""
        return self._give(self.text)

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def _pending(self, text: str) -> int:
        """How many trailing characters may begin a stop text."""
        longest = max((len(s) - 1 for s in self._stops), default=0)
        return next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0
        )
