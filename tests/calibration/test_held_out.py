"""Windows to measure on are of the text, and none of them was read by calibration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import llmkit
from llmkit.calibration.held_out import MOST_WINDOWS, held_out
from llmkit.calibration.samples import Samples
from llmkit.calibration.texts import CalibrationText, token_ids
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transforms"))
import family_world as world
import vocab_world

LINES = vocab_world.ENGLISH
TEXT = CalibrationText("english", "\n".join(LINES) * 4)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return llmkit.open_checkpoint(world.written(tmp_path_factory.mktemp("models") / "llama", "llama", None))


def test_no_window_was_read(ckpt):
    read = Samples(TEXT, n=12, length=24, seed=1)
    left = held_out(ckpt, read, read)
    ids = token_ids(TEXT, load_tokenizer(ckpt))
    everything = [tuple(ids[i : i + 24]) for i in range(0, len(ids) - 23, 24)]
    chosen = {tuple(row) for row in read.rows(ckpt, (), None)}
    assert len(chosen) == 12
    wanted = [row for row in everything if row not in chosen]
    assert len(left) == min(len(wanted), MOST_WINDOWS)
    assert {tuple(row) for row in left} <= set(wanted)
    assert not {tuple(row) for row in left} & chosen


def test_a_text_that_was_not_read_is_measured_whole(ckpt):
    other = CalibrationText("other", "\n".join(reversed(LINES)))
    samples = Samples(other, length=16)
    ids = token_ids(other, load_tokenizer(ckpt))
    n = len(ids) // 16
    found = held_out(ckpt, samples, None)
    assert len(found) == min(n, MOST_WINDOWS)
    assert found[0] == ids[:16]


def test_a_text_that_was_read_whole_leaves_nothing(ckpt):
    read = Samples(TEXT, n=10**6, length=24)
    with pytest.raises(InputError, match=r"calibration reads all \d+ windows of english"):
        held_out(ckpt, read, read)
