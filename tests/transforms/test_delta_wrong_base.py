"""Every wrong base that names, shapes, dtypes and small files give away is refused in the plan, with what to do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from delta_world import checkpoint, loaded, tuned_of, weights
from safetensors.torch import load_file, save_file
from vocab_world import ENGLISH, sp_model

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.classification import MARKER_NAME
from llmkit.errors import RequirementError, SpecError
from llmkit.transforms import delta as delta_transform

F32 = torch.float32


def refused(base, delta, match: str, **kwargs) -> RequirementError:
    with pytest.raises(RequirementError, match=match) as error:
        delta_transform.apply(base, delta, **kwargs)
    return error.value


@pytest.mark.parametrize("profile", [None, "vicuna", "alpaca"])
def test_other_size(tmp_path: Path, profile: str | None) -> None:
    base = checkpoint(tmp_path / "llama-13b", weights(96, layers=3, hidden=80))
    delta = checkpoint(tmp_path / "vicuna-7b-delta", weights(96))
    message = (
        "llama-13b is not the base of vicuna-7b-delta: it has 3 layers of width 80, the delta was made for 2 layers of"
    )
    error = refused(base, delta, message, profile=profile, force=True)
    assert error.hint == "give the base of the delta's size"


def test_other_vocabulary(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "chinese", weights(120))
    delta = checkpoint(tmp_path / "d", weights(96))
    error = refused(base, delta, "chinese has another vocabulary: 120 rows, d was made for 96 or fewer")
    assert error.hint == "give the base as it was released"


def test_more_rows_than_the_profile_adds(tmp_path: Path) -> None:
    base, delta = checkpoint(tmp_path / "base", weights(96)), checkpoint(tmp_path / "d", weights(97))
    error = refused(base, delta, "96 rows, d has 97, and profile vicuna adds none", profile="vicuna")
    assert "--profile vicuna-v0 (zero)" in (error.hint or "")


def test_other_family(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "mistral", weights(), architectures=["MistralForCausalLM"])
    delta = checkpoint(tmp_path / "d", weights(seed=3))
    error = refused(base, delta, "mistral is of another family: it is a MistralForCausalLM, d was made for Llama")
    assert "--force goes on regardless" in (error.hint or "")
    forced = delta_transform.apply(base, delta, force=True)
    assert any(w.startswith("forced: mistral is of another family") for w in forced.warnings)


def test_the_spelling_of_early_conversions_is_no_other_family(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "decapoda", weights(), architectures=["LLaMAForCausalLM"])
    delta_transform.apply(base, checkpoint(tmp_path / "d", weights(seed=3)))


def test_base_and_delta_are_the_same_folder(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", weights())
    assert "the base model first" in (refused(base, base, "both models are the same", force=True).hint or "")


def test_quantized_base(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "q", weights(), quantization_config={"quant_method": "gptq"})
    delta = checkpoint(tmp_path / "d", weights(seed=3))
    error = refused(base, delta, r"q is already quantized \(gptq\); delta apply wants float weights", force=True)
    assert (error.hint or "").startswith("take the float model")


def test_padded_and_tuned_base_of_the_alpaca_kind(tmp_path: Path) -> None:
    added = {"added_tokens.json": json.dumps({"[PAD]": 96})}
    base = checkpoint(tmp_path / "alpaca", weights(97, dtype=F32), added)
    delta = checkpoint(tmp_path / "wdiff", weights(97, seed=3, dtype=F32), added)
    error = refused(
        base, delta, r"alpaca is already tuned or extended: its embedding has the 1 rows \(of 97\)", profile="alpaca"
    )
    assert (error.hint or "").startswith("give the base as it was released")


def test_base_tuned_by_llmkit(tmp_path: Path) -> None:
    base, delta = checkpoint(tmp_path / "base", weights()), checkpoint(tmp_path / "d", weights(seed=3))
    save(delta_transform.apply(base, delta), tmp_path / "tuned")
    error = refused(open_checkpoint(tmp_path / "tuned"), delta, "tuned is already tuned: llmkit applied the delta d")
    assert (error.hint or "").startswith("give the untouched base")


def test_a_delta_from_what_llmkit_tuned_is_applied_to_it(tmp_path: Path) -> None:
    base, delta = checkpoint(tmp_path / "base", weights()), checkpoint(tmp_path / "d", weights(seed=3))
    save(delta_transform.apply(base, delta), tmp_path / "tuned")
    tuned, further = open_checkpoint(tmp_path / "tuned"), checkpoint(tmp_path / "further", tuned_of(weights()))
    save(delta_transform.make(tuned, further), tmp_path / "second")
    second = open_checkpoint(tmp_path / "second")
    found = delta_transform.apply(tuned, second)
    assert all(torch.equal(lazy.load(), further.tensors[name].load()) for name, lazy in found.tensors.items())
    save(found, tmp_path / "twice")
    refused(open_checkpoint(tmp_path / "twice"), second, "twice is already tuned: llmkit applied the delta second")


class TestLlmkitDeltas:
    def test_given_as_base(self, tmp_path: Path, made) -> None:
        delta = checkpoint(tmp_path / "d", weights(seed=3))
        error = refused(made, delta, r"made is a delta itself \(a delta, differences from base\)", force=True)
        assert error.hint == "llmkit delta apply BASE DELTA -o OUT"

    def test_base_of_another_dtype(self, tmp_path: Path, made) -> None:
        other = checkpoint(tmp_path / "other", {k: v.bfloat16() for k, v in weights().items()})
        error = refused(other, made, "other has other names, dtypes or shapes than the base the delta was made from")
        assert (error.hint or "").startswith("give base as it was")
        delta_transform.apply(other, made, force=True)

    @pytest.mark.parametrize("is_made_with_tables", [False, True])
    def test_rotary_tables_that_conversions_of_early_2023_stored_are_no_difference(
        self, tmp_path: Path, is_made_with_tables: bool
    ) -> None:
        tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        new = checkpoint(tmp_path / "huggyllama", weights())
        old = checkpoint(tmp_path / "decapoda", weights() | tables)
        tuned = checkpoint(tmp_path / "tuned", tuned_of(weights()))
        save(delta_transform.make(old if is_made_with_tables else new, tuned), tmp_path / "d")
        found = delta_transform.apply(new if is_made_with_tables else old, open_checkpoint(tmp_path / "d"))
        assert {n for n in found.tensors if n not in tables} == set(tuned.tensors)
        assert all(torch.equal(found.tensors[n].load(), lazy.load()) for n, lazy in tuned.tensors.items())

    def test_deltas_of_before_know_their_base_by_its_tables_too(self, tmp_path: Path) -> None:
        tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        base = checkpoint(tmp_path / "b", weights() | tables)
        delta = tmp_path / "d"
        save(delta_transform.make(base, checkpoint(tmp_path / "t", tuned_of(weights()))), delta)
        marker = json.loads((delta / MARKER_NAME).read_text())
        lines = "\n".join(f"{name} {base.tensors[name].spec}" for name in sorted(base.tensors))
        marker["base"]["specs"] = hashlib.sha256(lines.encode()).hexdigest()
        (delta / MARKER_NAME).write_text(json.dumps(marker))
        assert delta_transform.apply(base, open_checkpoint(delta)).tensors


@pytest.mark.parametrize("profile", ["llmkit", "vicuna"])
def test_integers_where_the_other_side_has_floats(tmp_path: Path, profile: str) -> None:
    """Of a delta in ulps, other integers or floats; of a published one, integers at a place of floats."""
    base = checkpoint(tmp_path / "base", weights())
    name = "model.layers.0.mlp.up_proj.weight"
    if profile == "llmkit":
        save(delta_transform.make(base, checkpoint(tmp_path / "tuned", tuned_of(weights()))), tmp_path / "d")
        file = tmp_path / "d" / "model.safetensors"
        state = load_file(file)
        save_file({**state, name: state[name].to(torch.int32)}, file)
        delta = open_checkpoint(tmp_path / "d")
    else:
        delta = checkpoint(tmp_path / "d", {**weights(seed=3), name: weights()[name].to(torch.int16)})
    with pytest.raises(SpecError, match=rf"{name}: (d has I32|base has F16\[96, 64\], d I16)"):
        delta_transform.apply(base, delta, force=True)


def test_swapped_names_are_warned_of(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "vicuna-7b-delta-v1.1", weights())
    result = delta_transform.apply(base, checkpoint(tmp_path / "model", weights(seed=3)))
    assert any("is called a delta, and delta model is not: were they swapped?" in w for w in result.warnings)


def test_other_tokenizer_of_the_same_size_is_warned_of(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "open", weights(), {"tokenizer.model": "a"})
    result = delta_transform.apply(base, checkpoint(tmp_path / "d", weights(seed=3), {"tokenizer.model": "b"}))
    assert any("tokenizer.model of open and d differ" in w for w in result.warnings)


def test_the_same_pieces_in_another_file_are_the_same_tokenizer(tmp_path: Path) -> None:
    """A base in GGUF has the pieces, and nothing of what the trainer noted."""
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", exc_type=ImportError)
    trained = sp_model(ENGLISH, 360)
    bare = pb.ModelProto(pieces=pb.ModelProto.FromString(trained).pieces).SerializeToString()
    assert bare != trained
    for label, data, seed in (("base", bare, 1), ("d", trained, 3)):
        checkpoint(tmp_path / label, weights(360, seed=seed))
        (tmp_path / label / "tokenizer.model").write_bytes(data)
    result = delta_transform.apply(*(open_checkpoint(tmp_path / label) for label in ("base", "d")))
    assert not [w for w in result.warnings if "tokenizer.model" in w]


def test_base_rounded_to_bfloat16_is_warned_of(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {k: v.bfloat16() for k, v in weights().items()})
    result = delta_transform.apply(base, checkpoint(tmp_path / "d", weights(seed=3)))
    assert any("stores bfloat16 though its config says float16" in w for w in result.warnings)


@pytest.mark.parametrize("side", ["base", "d"])
def test_names_of_one_side_only(tmp_path: Path, side: str) -> None:
    states = {"base": weights(), "d": weights(seed=3)}
    states[side]["model.layers.1.extra.weight"] = torch.ones(3).half()
    pair = [checkpoint(tmp_path / k, v) for k, v in states.items()]
    other = "d" if side == "base" else "base"
    with pytest.raises(
        SpecError, match=f"1 tensors of {side} are not in {other}: model.layers.1.extra.weight"
    ) as error:
        delta_transform.apply(*pair)
    assert "profile vicuna has no rule for them" in (error.value.hint or "")
    forced = delta_transform.apply(*pair, force=True)
    assert ("model.layers.1.extra.weight" in loaded(forced)) == (side == "d")


def test_nothing_is_read_for_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.tensors.source import SourceFile

    base, delta = checkpoint(tmp_path / "base", weights(96)), checkpoint(tmp_path / "d", weights(97, seed=3))
    tuned = checkpoint(tmp_path / "tuned", tuned_of(weights()))

    def refuse(*_: object) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(SourceFile, "read_tensor", refuse)
    delta_transform.apply(base, delta)
    delta_transform.make(base, tuned)
    delta_transform.make(base, tuned, profile="vicuna")
