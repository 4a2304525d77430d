"""Reading adapters: every saved form gives one table, and what cannot be merged is refused by name."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.formats.adapter import from_peft
from llmkit.formats.adapter_config import divisor_of, saved_modules, scaling_of
from llmkit.formats.adapter_names import TensorName, parse_name, parse_names
from llmkit.formats.adapter_opening import read_adapter

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
PATH = "model.layers.0.self_attn.q_proj"


def tensors(prefix="base_model.model.", infix="", path=PATH):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, generator=g), torch.randn(6, 2, generator=g)
    return {f"{prefix}{path}.lora_A{infix}.weight": a, f"{prefix}{path}.lora_B{infix}.weight": b}


def save(folder, state, config=LORA, name="adapter_model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.",
        "module.base_model.model.",
        "base_model.model._orig_mod.",
        "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.",
        "",
    ],
)
@pytest.mark.parametrize("infix", ["", ".default", ".my-adapter"])
def test_every_saved_form_gives_the_same_table(tmp_path, name, prefix, infix):
    adapter = read_adapter(save(tmp_path, tensors(prefix, infix), name=name))
    assert list(adapter.modules) == [PATH]
    assert adapter.scaling == {PATH: 2.0}
    assert adapter.ranks == {PATH: 2}
    for (_, stored), part in zip(tensors().items(), ("lora_A", "lora_B"), strict=True):
        assert torch.equal(adapter.modules[PATH][part].load(), stored)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("base_model.model.x.lora_embedding_A", TensorName("x", "lora_embedding_A")),
        ("base_model.model.x.lora_embedding_A.default", TensorName("x", "lora_embedding_A", "default")),
        ("base_model.model.x.lora_magnitude_vector", TensorName("x", "lora_magnitude_vector")),
        (
            "base_model.model.x.lora_magnitude_vector.default.weight",
            TensorName("x", "lora_magnitude_vector", "default"),
        ),
        ("base_model.model.x.lora_B.bias", TensorName("x", "lora_B.bias")),
        ("base_model.model.x.lora_B.default.bias", TensorName("x", "lora_B.bias", "default")),
        ("base_model.model.lm_head.weight", TensorName("lm_head", "weight")),
        ("base_model.model.lm_head.modules_to_save.default.weight", TensorName("lm_head", "weight", "default")),
        ("base_model.model.lm_head.original_module.weight", None),
        ("base_model.model.x.base_layer.weight", TensorName("x", "base_weight")),
        ("base_model.model.x.base_layer.bias", TensorName("x", "bias")),
        ("base_model.model.e.token_adapter.trainable_tokens_delta", TensorName("e", "trainable_tokens_delta")),
        ("base_model.model.e.token_adapter.trainable_tokens_original.default", None),
        ("base_model.model.n.ln_tuning_layers.default.weight", TensorName("n", "weight", "default")),
        ("base_model.model.x.ia3_l", TensorName("x", "ia3_l")),
        ("base_model.model.x.hada_w1_a.default", TensorName("x", "hada_w1_a", "default")),
        ("base_model.model.x.lokr_w1", TensorName("x", "lokr_w1")),
    ],
)
def test_names(stored, expected):
    assert parse_name(stored) == expected


def test_many_names_are_parsed_as_each_of_them():
    heads = ["", "0", "base_model.model.model.layers.3.mlp.experts.17", "module.0", "a.lora_A.b.0", "m._orig_mod.h.3"]
    heads += ["x.modules_to_save.0", "x.modules_to_save.default.h.1", "ia3", "hada_w1", "x.original_module.1"]
    tails = ["", ".lora_A.weight", ".lora_B.default.bias", ".q.lora_A.weight", "..lora_A.weight", ".lora_A", "_l", "_a"]
    tails += [".w._orig_mod.lora_B.weight", ".e.token_adapter.trainable_tokens_delta", ".x.lora_velora_embed", ".bias"]
    tails += [".base_layer.weight", ".base_layer.lora_A.weight", ".modules_to_save.default.weight", ".ranknum"]
    names = [head + tail for head in heads for tail in tails]
    assert parse_names(names) == {name: parse_name(name) for name in names}


def test_scaling():
    config = {"lora_alpha": 6, "alpha_pattern": {r"layers\.1\..*": 3, "q_proj": 9}}
    assert scaling_of(config, "LORA", "layers.0.q_proj", 3) == 3
    assert scaling_of(config, "LORA", "layers.1.v_proj", 3) == 1
    assert scaling_of(config | {"use_rslora": True}, "LORA", "layers.0.k_proj", 4) == 3
    assert scaling_of({"lora_alpha": 6, "init_r": 12}, "ADALORA", "x", 3) == 6
    assert scaling_of({"lora_alpha": 0, "init_r": 12}, "ADALORA", "x", 3) == 12
    assert divisor_of({"lora_alpha": 6, "init_r": 12}, "ADALORA", 3) == 12 + 1e-5
    assert divisor_of({"lora_alpha": 6}, "LORA", 3) == 1
    assert scaling_of({"alpha": 5}, "LOHA", "x", 2) == 2.5
    with pytest.raises(InputError, match="lora_alpha is None"):
        scaling_of({}, "LORA", "x", 2)
    with pytest.raises(InputError, match="r is 0; expected a positive whole number"):
        scaling_of({"alpha": 5, "r": 0}, "LOKR", "x", 0)


@pytest.mark.parametrize("value", [7, "lm_head", {"lm_head": 1}, [7]])
def test_modules_to_save_of_another_type_name_none(value):
    assert "lm_head" not in saved_modules({"modules_to_save": value})
    assert from_peft("x", LORA | {"modules_to_save": value}, tensors()).ranks == {PATH: 2}


def test_rank_is_that_of_the_tensors_and_old_or_unknown_keys_are_told_apart(tmp_path):
    config = LORA | {"r": 8, "enable_lora": None, "merge_weights": False, "surprise": 1}
    adapter = read_adapter(save(tmp_path, tensors(), config))
    assert adapter.scaling == {PATH: 2.0}
    assert len(adapter.warnings) == 2
    assert "gives" in adapter.warnings[1]
    assert "rank 8, its tensors have rank 2" in adapter.warnings[1]
    assert adapter.warnings[0].endswith("not considered: surprise")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_the_well_known_empty_adapter_is_an_error(tmp_path, name):
    folder = save(tmp_path / "empty", {}, name=name)
    with pytest.raises(InputError, match="holds no adapter tensors") as caught:
        read_adapter(folder)
    assert "save again" in caught.value.hint


def test_tensors_that_are_no_adapter_are_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no adapter tensors; it holds base_model"):
        read_adapter(save(tmp_path, {"base_model.model.model.norm.weight": torch.ones(4)}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16, which changes the base"),
        ({"init_lora_weights": "olora"}, "olora, which changes the base"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"alora_invocation_tokens": [1]}, "aLoRA cannot be merged"),
        ({"arrow_config": {"top_k": 2}}, "arrow routing cannot"),
        ({"layer_replication": [[0, 2]]}, "layer replication cannot"),
        ({"use_qalora": True}, "QA-LoRA cannot"),
        ({"monteclora_config": {}} | {"monteclora_config": {"num_samples": 4}}, "MonteCLoRA cannot"),
        ({"kasa_config": {"beta": 1}}, "KaSA cannot"),
        ({"peft_type": "VERA"}, "adapters of type VERA are not merged"),
        ({"peft_type": "OFT"}, "OFT"),
        ({"peft_type": "BOFT"}, "BOFT"),
        ({"peft_type": "PREFIX_TUNING"}, "virtual tokens"),
        ({"peft_type": "ADAPTION_PROMPT"}, "gated prompt attention"),
    ],
)
def test_refusals_name_the_method_and_say_what_to_do(tmp_path, changes, match):
    folder = save(tmp_path, tensors(), LORA | changes)
    with pytest.raises(RequirementError, match=match) as caught:
        read_adapter(folder)
    assert caught.value.hint


def test_a_changed_base_can_be_vouched_for(tmp_path):
    adapter = read_adapter(save(tmp_path, tensors(), LORA | {"init_lora_weights": "pissa"}), force=True)
    assert adapter.warnings[0].startswith("forced: ")


def test_malformed_files(tmp_path):
    a, _ = tensors().values()
    names = list(tensors())
    with pytest.raises(InputError, match="has lora_A but no lora_B"):
        read_adapter(save(tmp_path / "half", {names[0]: a}))
    with pytest.raises(InputError, match=r"1 of its 2 tensors are empty .*ZeRO-3, FSDP\) were not gathered"):
        read_adapter(save(tmp_path / "flat", {names[0]: a, names[1]: torch.zeros(0)}))
    with pytest.raises(InputError, match="expected two matrices"):
        read_adapter(save(tmp_path / "long", {names[0]: a, names[1]: torch.zeros(6)}))
    with pytest.raises(SpecError, match=r"rank 2.*rank 3"):
        read_adapter(save(tmp_path / "ranks", {names[0]: a, names[1]: torch.zeros(6, 3)}))
    with pytest.raises(InputError, match="several adapters: one, two"):
        read_adapter(save(tmp_path / "two", tensors(infix=".one") | tensors(infix=".two", path="model.other")))
    with pytest.raises(InputError, match="beside it: their scaling is not known") as caught:
        read_adapter(save(tmp_path / "bare", tensors(), None))
    assert "lora_alpha" in caught.value.hint
    with pytest.raises(InputError, match="holds no adapter"):
        read_adapter(tmp_path)


def test_tokens_need_their_ids(tmp_path):
    state = tensors() | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(2, 8)}
    adapter = read_adapter(save(tmp_path / "a", state, LORA | {"trainable_token_indices": [5, 1]}))
    assert adapter.tokens["model.embed_tokens"][0] == (5, 1)
    by_name = LORA | {"trainable_token_indices": {"lm_head": [0], "embed_tokens": [7, 8]}}
    assert read_adapter(save(tmp_path / "b", state, by_name)).tokens["model.embed_tokens"][0] == (7, 8)
    with pytest.raises(SpecError, match="2 trained rows for 3 token ids"):
        read_adapter(save(tmp_path / "c", state, LORA | {"trainable_token_indices": [5, 1, 2]}))


def test_a_raw_dump_of_the_whole_model_gives_the_adapter_only():
    from llmkit.tensors.lazy import Apply
    from llmkit.tensors.spec import DType, TensorSpec

    def lazy(*shape):
        return Apply("zeros", [], TensorSpec(DType.F32, shape), lambda: torch.zeros(shape), row_step=None).output()

    state = {}
    for i in range(4):
        path = f"base_model.model.model.layers.{i}.q_proj"
        state |= {f"{path}.lora_A.default.weight": lazy(2, 8), f"{path}.lora_B.default.weight": lazy(6, 2)}
        state[f"{path}.base_layer.weight"] = lazy(6, 8)
    adapter = from_peft("dump", LORA, state)
    assert len(adapter.modules) == 4
    assert not adapter.replacements


def test_saved_modules_without_values_are_told(tmp_path):
    state = tensors() | {"base_model.model.lm_head.weight": torch.zeros(0)}
    with pytest.raises(InputError, match=r"1 of its 3 tensors are empty \(base_model.model.lm_head.weight\)"):
        read_adapter(save(tmp_path, state))


def test_numbers_and_truth_values_as_text(tmp_path):
    plain = read_adapter(save(tmp_path / "a", tensors(), LORA | {"lora_alpha": 6, "use_rslora": True}))
    text = {"lora_alpha": "6", "r": "2", "use_rslora": "true", "use_dora": "false", "alpha_pattern": {"nothing": "3"}}
    adapter = read_adapter(save(tmp_path / "b", tensors(), LORA | text))
    assert adapter.scaling == plain.scaling
    assert not adapter.warnings
    with pytest.raises(InputError, match="lora_alpha is 'eight'; expected a number"):
        read_adapter(save(tmp_path / "c", tensors(), LORA | {"lora_alpha": "eight"}))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_object(tmp_path, key):
    for i, value in enumerate((None, {}, [], "")):
        read_adapter(save(tmp_path / f"empty{i}", tensors(), LORA | {key: value}))
    for i, value in enumerate(("x", ["q_proj"], 4, True, float("nan"))):
        with pytest.raises(InputError, match=r"rank_pattern or alpha_pattern is .*; expected an object"):
            read_adapter(save(tmp_path / f"wrong{i}", tensors(), LORA | {key: value}))


def test_the_one_adapter_in_a_subfolder_is_taken_and_several_are_listed(tmp_path):
    save(tmp_path / "mine", tensors())
    adapter = read_adapter(tmp_path)
    assert adapter.label == "mine"
    assert adapter.notes[0].endswith(f"the one in {tmp_path / 'mine'} is taken")
    for n in (9, 10):
        save(tmp_path / f"checkpoint-{n}", tensors())
    with pytest.raises(InputError, match="3 folders with one") as caught:
        read_adapter(tmp_path)
    assert str(tmp_path / "checkpoint-10") in caught.value.hint


# Files that PEFT did not write.


def test_mlx(tmp_path):
    """mlx_lm/tuner/lora.py, fuse: weight + (scale * lora_b.T) @ lora_a.T; of an embedding weight + scale * a @ b."""
    a, b, v = torch.randn(8, 2), torch.randn(2, 6), torch.randn(20, 2)
    state = {"model.layers.0.self_attn.q_proj.lora_a": a, "model.layers.0.self_attn.q_proj.lora_b": b}
    state |= {"model.embed_tokens.lora_a": v, "model.embed_tokens.lora_b": torch.randn(2, 8)}
    (tmp_path / "m").mkdir()
    save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "m" / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
    (tmp_path / "m" / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path / "m")
    parts = adapter.modules["model.layers.0.self_attn.q_proj"]
    assert adapter.scaling["model.layers.0.self_attn.q_proj"] == 20
    assert torch.allclose(parts["lora_B"].load() @ parts["lora_A"].load(), b.T @ a.T, atol=1e-6)
    ends = adapter.modules["model.embed_tokens"]
    assert torch.equal(ends["lora_embedding_A"].load().T, v)
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"without lora_parameters\.scale"):
        read_adapter(tmp_path / "m")


def of_llama_cpp(path, architecture, tensor):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor(tensor, np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_adapters_of_torchtune_and_llama_cpp_are_named(tmp_path):
    state = {"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 8)}
    state["layers.0.attn.q_proj.lora_b.weight"] = torch.ones(6, 2)
    for folder in (save(tmp_path / "a", state, name="adapter_model.pt"), save(tmp_path / "b", state, None)):
        with pytest.raises(InputError, match="adapter of torchtune") as caught:
            read_adapter(folder)
        assert "adapter_model.safetensors" in caught.value.hint
    of_llama_cpp(tmp_path / "lora.gguf", "llama", "blk.0.attn_q.weight.lora_a")
    (tmp_path / "old.bin").write_bytes(b"algg\1\0\0\0" + bytes(64))
    for name in ("lora.gguf", "old.bin"):
        with pytest.raises(InputError, match=r"a LoRA of llama\.cpp's") as caught:
            read_adapter(tmp_path / name)
        assert "llama-export-lora" in caught.value.hint
    of_llama_cpp(tmp_path / "vector.gguf", "controlvector", "direction.1")
    with pytest.raises(InputError, match=r"vector\.gguf is a GGUF file that holds no adapter"):
        read_adapter(tmp_path / "vector.gguf")


@pytest.mark.parametrize("start", ["lora_unet_mid_block.lora_down", "unet.mid_block.to_q.lora.down"])
def test_adapters_of_image_models_are_named(tmp_path, start):
    state = {f"{start}.weight": torch.ones(2, 8)}
    folder = save(tmp_path, state, None, name="pytorch_lora_weights.safetensors")
    for path in (folder, folder / "pytorch_lora_weights.safetensors"):
        with pytest.raises(InputError, match="adapter of an image model"):
            read_adapter(path)


@pytest.mark.parametrize(
    "state",
    [
        {"adapter_query.weight": torch.zeros(4, 8), "layers.2.attention.gate": torch.zeros(1, 2, 1, 1)},
        {"adapter_wte.weight": torch.zeros(4, 8), "transformer.h.2.attn.gating_factor": torch.zeros(1, 2, 1, 1)},
    ],
)
def test_gated_prompts_are_refused_with_the_reason(tmp_path, state):
    torch.save(state, tmp_path / "adapter.pth")
    with pytest.raises(RequirementError, match="softmax and a gate of its own") as caught:
        read_adapter(tmp_path / "adapter.pth")
    assert "own code" in caught.value.hint


def test_foldable_parts_beside_gated_prompts_need_force(tmp_path):
    state = {
        "llama.layers.1.attention.wq.bias": torch.zeros(8),
        "llama.layers.1.attention.lora_wq_l1.weight": torch.zeros(2, 8),
        "llama.layers.1.attention.lora_wq_l2.weight": torch.zeros(8, 2),
        "llama.layers.1.attention_norm.weight": torch.zeros(8),
        "llama.layers.1.attention.gate": torch.zeros(1, 2, 1, 1),
    }
    torch.save({"model": state, "config": {"w_bias": True}}, tmp_path / "adapter.pth")
    with pytest.raises(RequirementError, match="gated prompts") as caught:
        read_adapter(tmp_path / "adapter.pth")
    assert "--force folds" in caught.value.hint
    adapter = read_adapter(tmp_path / "adapter.pth", force=True)
    assert sorted(adapter.modules["layers.1.attention.wq"]) == ["lora_A", "lora_B", "new_bias"]
    assert list(adapter.replacements) == ["layers.1.attention_norm.weight"]
    assert adapter.warnings[0].startswith("forced: ")
