"""Names of tensors, of which a model has a hundred thousand that differ by numbers."""

from __future__ import annotations

import string

_WORDS = f"{string.ascii_letters}._"


def cut(name: str) -> tuple[str, str, str]:
    """What is before a name's last number, the number, and what follows: few of each in a model, to be looked up."""
    head = name.rstrip(_WORDS)
    before = head.rstrip(string.digits)
    return before, head[len(before) :], name[len(head) :]
