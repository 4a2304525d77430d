"""Statistics in files: an importance matrix by GGUF's names reaches the weights of any layout of the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llmkit.architecture.registry import default_registry
from llmkit.architecture.slots import Slot
from llmkit.calibration.stored import StoredQuantizer
from llmkit.checkpoint.statistics import gguf_spelling, open_statistics
from llmkit.decoder.contract import random_checkpoint
from llmkit.errors import InputError, LlmkitError, RequirementError, SpecError
from llmkit.transforms.convert import gguf
from llmkit.transforms.quantize import quantize

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
import imatrix_world as world

ARCHITECTURES = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}


def model(name="llama"):
    architecture = ARCHITECTURES[name]
    return random_checkpoint(architecture, architecture.tiny_config())


@pytest.fixture
def files(tmp_path):
    """Writes an importance matrix of some tensors, (GGUF name, inputs) each."""

    def write(*sizes, made=world.of_gguf):
        return made(tmp_path / "imatrix", {n: world.np.arange(1, size + 1, dtype="<f4") for n, size in sizes})

    return write


@pytest.mark.parametrize("made", [world.of_gguf, world.of_binary])
@pytest.mark.parametrize(
    ("family", "tensor", "slot"),
    [
        ("llama", "blk.1.ffn_down.weight", "layers.1.mlp.down.weight"),
        ("gpt_neox", "blk.0.attn_qkv.weight", "layers.0.attn.qkv.weight"),
        ("phi3", "blk.0.attn_qkv.weight", "layers.0.attn.qkv.weight"),
    ],
)
def test_importance_by_names_of_gguf_reaches_the_stored_weights(files, made, family, tensor, slot):
    ckpt = model(family)
    stored = ckpt.require_model().slots[slot]
    n_in = stored.shape[1]
    found = open_statistics(files((tensor, n_in), made=made), ckpt)
    assert set(found.known(stored)) == {"squares"}
    expected = torch.arange(1, n_in + 1) / world.TOKENS
    torch.testing.assert_close(found.of(stored).mean_squares, expected)
    other = ckpt.require_model().slots["layers.0.attn.o.weight"]
    assert found.of(other) is None
    assert not found.known(other)


@pytest.mark.parametrize("way", ["folder", "gguf"])
def test_matrices_of_which_a_file_tells_nothing_are_named(files, way):
    """A file of a model with fewer layers, or of a run that did not reach all of them, fits and weighs only a part."""
    ckpt = model()
    slots = [slot for slot in ckpt.require_model().slots.values() if slot.kind == "linear" and slot.layer is not None]
    names = {slot.id: slot.name for slot in gguf_spelling(ckpt, ckpt.require_model()).slots.values()}
    sizes = [(names[slot.id], slot.shape[1]) for slot in slots]
    for known, words in ((sizes, None), (sizes[1:], slots[0]), (sizes[3:], "of 3 matrices")):
        statistics = open_statistics(files(*known), ckpt)
        if way == "gguf":
            made = gguf.write(ckpt, type="q4_0", statistics=statistics)
            words = names[words.id] if isinstance(words, Slot) else words
        else:
            made = quantize(ckpt, bits=4, group_size="channel", quantizer=StoredQuantizer(ckpt, statistics))
            words = words.name if isinstance(words, Slot) else words
        (said,) = [note for note in made.notes if "imatrix" in note] or [""]
        assert ("tells nothing of the inputs" in said) is (words is not None)
        assert words is None or words in said


def test_statistics_of_another_model_are_refused(files):
    with pytest.raises(SpecError, match="measured with another model"):
        open_statistics(files(("blk.0.ffn_down.weight", 7)), model())
    with pytest.raises(SpecError, match="does not have"):
        open_statistics(files(("blk.9.ffn_down.weight", 7)), model())
    with pytest.raises(RequirementError, match=r"llama\.cpp does not know"):
        open_statistics(files(("blk.0.ffn_down.weight", 7)), model("chatglm"))


def test_a_file_without_statistics_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a.squares": torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no statistics"):
        open_statistics(tmp_path / "a.safetensors", model())
    with pytest.raises(LlmkitError, match="none does not exist: no statistics"):
        open_statistics(tmp_path / "none", model())
