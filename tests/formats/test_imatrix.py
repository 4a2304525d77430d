"""Importance matrices in both generations: the means that were stored, and files that are none."""

from __future__ import annotations

import pytest
import torch
from imatrix_world import SUMS, TOKENS, of_binary, of_gguf

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import InputError
from llmkit.formats import imatrix
from llmkit.transforms.vocab import open_tokenizer


@pytest.mark.parametrize("made", [of_gguf, of_binary, lambda path: of_binary(path, has_dataset=False)])
def test_means_are_those_that_were_stored(tmp_path, made):
    found = imatrix.read(made(tmp_path / "imatrix"))
    assert set(found.entries) == set(SUMS)
    assert found.datasets in (("wiki.txt",), ())
    for name, sums in SUMS.items():
        entry = found.entries[name]
        mean = entry.sums.load() / torch.tensor(entry.counts)[:, None]
        torch.testing.assert_close(mean, torch.from_numpy(sums / TOKENS)[None])


def test_the_older_form_is_named_where_a_model_or_a_tokenizer_is_wanted(tmp_path):
    path = of_binary(tmp_path / "imatrix.dat")
    for read in (open_checkpoint, open_tokenizer):
        with pytest.raises(InputError, match=r"is an importance matrix of llama.cpp: .* not weights") as caught:
            read(path)
        assert caught.value.hint == f"llmkit quantize MODEL --bits 4 --statistics {path} -o OUT"


@pytest.mark.parametrize("made", [of_gguf, of_binary])
def test_truncated_and_mangled_files_are_refused(tmp_path, made):
    whole = made(tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    for n in range(0, len(whole) - 4 * 12 * 2, 7):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError):
            imatrix.read(path)
    for place in range(8):
        path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        with pytest.raises(InputError):
            imatrix.read(path)


def test_what_is_no_importance_matrix_is_said(tmp_path):
    with pytest.raises(InputError, match="GGUF of a model"):
        imatrix.read(of_gguf(tmp_path / "a", kind="model"))
    with pytest.raises(InputError, match="no counts"):
        imatrix.read(of_gguf(tmp_path / "b", counts=-1.0))
    (tmp_path / "c").write_text("a text that is none of both generations")
    with pytest.raises(InputError, match="no importance matrix"):
        imatrix.read(tmp_path / "c")
