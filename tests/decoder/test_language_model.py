"""Token ids that no backend takes."""

from __future__ import annotations

import pytest
import torch

from llmkit.decoder.language_model import token_ids
from llmkit.errors import InputError


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, 2], r"shape \[2\]"),
        ([[1.0, 2.0]], "float32"),
        ([[0, 7]], "0..6, found 0..7"),
        (torch.zeros(1, 0, dtype=torch.int64), "found none"),
    ],
)
def test_ids_that_no_embedding_has_are_refused(ids, words):
    with pytest.raises(InputError, match=words):
        token_ids(ids, 7, torch.device("cpu"))
