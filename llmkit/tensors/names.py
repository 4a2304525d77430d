"""Names of tensors, of which a model has a hundred thousand that differ by numbers."""

from __future__ import annotations

import string

_WORDS = f"{string.ascii_letters}._"


def cut(name: str) -> tuple[str, str]:
    """A name up to its last number, and what follows: few of either in a model, so that one can be looked up."""
    head = name.rstrip(_WORDS)
    return head, name[len(head) :]
