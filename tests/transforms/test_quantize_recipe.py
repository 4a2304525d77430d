"""A grid for each matrix: recipes, heads and embeddings, and what loads the result."""

import json

import pytest
import torch
import transformers

import llmkit
from llmkit.checkpoint.quantized import dequantized
from llmkit.errors import InputError, SpecError
from llmkit.quantization.matrix import Grid, matrix_of
from llmkit.quantization.points import FP8
from llmkit.transforms.quantize import quantize
from llmkit.transforms.recipe import FLOAT, Scheme, read_recipe
from llmkit.transforms.schemes import head_and_embedding_recipe
from tests.transforms.test_quantize import hf_logits, write_model

RECIPE = """
"*.layers.1.mlp.down_proj": float
"*.down_proj": {bits: 8, group_size: channel}
"*.v_proj": 2
lm_head: {bits: 3, symmetric: true}
"""


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "m")
    return llmkit.open_checkpoint(tmp_path / "m")


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return read_recipe(tmp_path / "recipe.yaml")


def grids(folder):
    restored = dequantized(llmkit.open_checkpoint(folder))
    found = {name.removesuffix(".weight"): matrix_of(lazy) for name, lazy in restored.tensors.items()}
    return {name: matrix.grid for name, matrix in found.items() if matrix is not None}


def matrix_of_module(ckpt, module):
    return matrix_of(dequantized(ckpt).tensors[f"{module}.weight"])


def test_transformers_loads_a_mix_and_computes_what_we_restore(tmp_path, model, recipe):
    llmkit.save(quantize(model, bits=4, group_size=32, recipe=recipe), tmp_path / "q")
    found = grids(tmp_path / "q")
    assert "model.layers.1.mlp.down_proj" not in found
    assert found["model.layers.0.mlp.down_proj"] == Grid(8, None, True)
    assert {found[f"model.layers.{i}.self_attn.v_proj"] for i in (0, 1)} == {Grid(2, 32, True)}
    assert found["model.layers.0.self_attn.q_proj"] == Grid(4, 32, True)
    assert found["lm_head"] == Grid(3, 32, True)
    llmkit.save(dequantized(llmkit.open_checkpoint(tmp_path / "q")), tmp_path / "floats")
    torch.testing.assert_close(hf_logits(tmp_path / "q"), hf_logits(tmp_path / "floats"), atol=1e-5, rtol=0)
    step = json.loads((tmp_path / "q" / "llmkit.json").read_text())["recipe"][-1]
    assert step["recipe"] == {
        "*.layers.1.mlp.down_proj": "float", "*.down_proj": {"bits": 8, "group_size": "channel"},
        "*.v_proj": {"bits": 2}, "lm_head": {"bits": 3, "symmetric": True},
    }  # fmt: skip


def test_gptq_names_the_others_in_dynamic(tmp_path, model, recipe):
    recipe.pop("lm_head")  # its 80 rows do not fill words
    llmkit.save(quantize(model, bits=4, group_size=32, recipe=recipe, format="gptq"), tmp_path / "q")
    entry = llmkit.open_checkpoint(tmp_path / "q").config["quantization_config"]
    assert (entry["bits"], entry["group_size"], entry["lm_head"]) == (4, 32, False)
    assert entry["dynamic"][r"+:^model\.layers\.0\.mlp\.down_proj$"]["bits"] == 8
    assert entry["dynamic"][r"-:^model\.layers\.1\.mlp\.down_proj$"] == {}
    assert grids(tmp_path / "q")["model.layers.0.self_attn.v_proj"] == Grid(2, 32, True)


def test_without_bits_only_what_the_recipe_names_is_quantized(model):
    out = quantize(model, bits=None, recipe={"*.v_proj": Scheme(4)})
    assert {name.split(".")[-2] for name in set(out.tensors) - set(model.tensors)} == {"v_proj"}


@pytest.mark.parametrize(
    ("recipe", "format", "words"),
    [
        ({"*.v_prj": Scheme(8)}, "compressed-tensors", "matches no module"),
        ({"model.embed_tokens": Scheme(8)}, "compressed-tensors", "no loader of compressed-tensors takes quantized"),
        ({"*.input_layernorm": Scheme(8)}, "compressed-tensors", "norm"),
        ({"*.v_proj": Scheme(9)}, "compressed-tensors", "9"),
        ({"*.v_proj": Scheme(8)}, "awq", r"^\*\.v_proj is to have 8 bits; expected 4 in awq"),
        ({"*.v_proj": Scheme(4, 16)}, "awq", "one group size for all"),
        ({"*.v_proj": Scheme(type="Q6_K")}, "gptq", "GGUF"),
        ({"lm_head": Scheme(4)}, "gptq", "80 outputs do not fill words"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(model, recipe, format, words):
    with pytest.raises((InputError, SpecError), match=words) as error:
        quantize(model, bits=4, recipe=recipe, format=format)
    assert error.value.hint or "group size" in words
    assert "--keep" not in str(error.value.hint)  # of what the recipe names


def test_head_and_embedding_by_their_bits(tmp_path, model):
    assert head_and_embedding_recipe(model, head_bits=8, embedding_bits=16) == {
        "lm_head.weight": Scheme(8), "model.embed_tokens.weight": FLOAT,
    }  # fmt: skip
    write_model(tmp_path / "tied", tied=True)
    tied = llmkit.open_checkpoint(tmp_path / "tied")
    with pytest.raises(SpecError, match="its head is its embedding"):
        head_and_embedding_recipe(tied, head_bits=8, embedding_bits=None)
    assert head_and_embedding_recipe(tied, head_bits=8, embedding_bits=8) == {"model.embed_tokens.weight": Scheme(8)}


def test_bits_alone_are_of_the_type_that_all_others_have(model):
    """As the options say: fp8 is what 8 bits are there; a group size asks for integers."""
    recipe = {"lm_head": Scheme(8), "*.v_proj": Scheme(8, 32), "*.k_proj": Scheme(4)}
    made = quantize(model, bits=8, type="fp8", recipe=recipe, method="rtn")
    assert matrix_of_module(made, "lm_head").grid == Grid(8, None, True, FP8)
    assert matrix_of_module(made, "model.layers.0.self_attn.v_proj").grid == Grid(8, 32, True)
    assert matrix_of_module(made, "model.layers.0.self_attn.k_proj").grid.bits == 4
    assert matrix_of_module(made, "model.layers.0.self_attn.q_proj").grid == Grid(8, None, True, FP8)


def test_that_transformers_rounds_inputs_beside_other_grids_is_said(tmp_path, model):
    """Float8 layers alone have their weights restored; beside others their inputs are rounded, too."""
    alone = quantize(model, bits=8, type="fp8", method="rtn")
    mixed = quantize(model, bits=8, type="fp8", recipe={"*.down_proj": Scheme(4, 32)}, method="rtn")
    for made, is_rounded in ((alone, False), (mixed, True)):
        folder = tmp_path / f"q{is_rounded}"
        llmkit.save(made, folder)
        llmkit.save(dequantized(llmkit.open_checkpoint(folder)), tmp_path / f"floats{is_rounded}")
        apart = (hf_logits(folder) - hf_logits(tmp_path / f"floats{is_rounded}")).abs().max()
        if int(transformers.__version__[0]) >= 5:
            assert bool(apart > 1e-3) is is_rounded
        assert any("rounds the inputs of fp8 layers" in note for note in made.notes) is is_rounded


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a",
        '"*": true',
        '"*": {bits: x}',
        '"*": {bit: 4}',
        '"*": {bits: 4, group_size: 1.5}',
        "*.x: 4",
        '"*.x": 4\n"*.x": 8',
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=r"recipe\.yaml"):
        read_recipe(tmp_path / "recipe.yaml")
