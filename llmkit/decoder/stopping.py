"""Text as its tokens arrive, up to the first stop text; nothing is given out that a later token could change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]


class TextStream:
    """The text of tokens that arrive one by one.

    Args:
        decode: token ids -> text.
        stops: texts that end it; the first that occurs is cut off.

    Attributes:
        ids: the tokens so far.
        is_stopped: a stop text has occurred.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(s for s in stops if s)
        self._given = 0
        self.ids: list[int] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """The whole text, without a stop text and what follows it."""
        whole = self._decode(self.ids)
        places = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        return whole[: min(places)] if places else whole

    def push(self, token: int) -> str:
        """Take a token; give the text that is certain now and was not given before."""
        self.ids.append(token)
        whole = self._decode(self.ids)
        places = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return self._give(whole[: min(places)])
        # a character may be spelt by several tokens, and so may a stop text
        certain = whole if not whole.endswith("\ufffd") else whole[: self._given]
        return self._give(certain[: len(certain) - self._pending(certain)])

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        return self._give(self.text)

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def _pending(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        longest = max((len(s) - 1 for s in self._stops), default=0)
        return next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0
        )
