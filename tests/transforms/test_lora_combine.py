"""Combining and extracting: formulas restated in plain torch, peft where it computes the same, and peft as reader."""

from __future__ import annotations

import math
import shutil

import peft_world as world
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel

import llmkit
from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.quantization.quality import Meter
from llmkit.tensors.lazy import Apply
from llmkit.transforms.lora import adapter_of, combine, extract, merge, open_adapter, survey

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("combine")
    model = world.llama()
    world.save_base(model, folder / "base")
    world.train(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), folder / "a", seed=1)
    world.train(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), folder / "b", seed=2)
    world.train(
        model, LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj"]), folder / "c", seed=3
    )
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}}
    world.train(model, LoraConfig(r=4, target_modules=TARGETS, **patterns), folder / "p", seed=4)
    world.train(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), folder / "e", seed=5)
    return folder


def updates(adapter):
    """Module -> s B A, in float64."""
    found = {}
    for module, parts in adapter.modules.items():
        a, b = (next(t.load().double() for p, t in parts.items() if p.endswith(x)) for x in ("_A", "_B"))
        found[module] = adapter.scaling[module] * (b @ a)
    return found


def assert_close(found, expected, tol=1e-6):
    assert found.keys() == expected.keys()
    for module, want in expected.items():
        assert (found[module] - want).abs().max() <= tol * want.abs().max(), module


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("name", ["a", "c", "p", "e"])
def test_one_adapter_with_weight_one_is_itself(folders, name, method):
    a = open_adapter(folders / name)
    density = None if method in ("cat", "svd", "linear") else 1.0
    made = adapter_of(combine([a], method=method, weights=[1.0], density=density))
    assert_close(updates(made), updates(a))
    if method != "svd":
        for module, parts in a.modules.items():
            for part, tensor in parts.items():
                assert torch.equal(made.modules[module][part].load(), tensor.load())


def test_cat_is_the_exact_sum_of_any_adapters(folders):
    adapters = [open_adapter(folders / n) for n in "acp"]
    weights = [0.7, -1.3, 2.0]
    expected: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module, update in updates(adapter).items():
            expected[module] = expected.get(module, 0) + weight * update
    assert_close(updates(adapter_of(combine(adapters, method="cat", weights=weights))), expected)
    full = adapter_of(combine(adapters, method="svd", weights=weights, rank=11))
    assert_close(updates(full), expected, 2e-6)


def test_svd_is_the_best_of_its_rank(folders):
    adapters = [open_adapter(folders / n) for n in "ab"]
    made = updates(adapter_of(combine(adapters, method="svd", weights=[1.0, 0.5], rank=3)))
    for module, update in updates(adapters[0]).items():
        total = update + 0.5 * updates(adapters[1])[module]
        s = torch.linalg.svdvals(total)
        assert torch.linalg.norm(total - made[module]) == pytest.approx(float(s[3:].norm()), rel=1e-5)


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "magnitude_prune"])
def test_equals_peft_where_peft_is_right(folders, method):
    # With alpha = r for plain LoRA none of peft's known faults applies.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    live = PeftModel.from_pretrained(model, folders / "a", adapter_name="a")
    live.load_adapter(folders / "b", adapter_name="b")
    density = 0.4 if method in ("ties", "magnitude_prune") else None
    live.add_weighted_adapter(["a", "b"], [0.6, 0.9], "mix", combination_type=method, density=density)
    made = updates(
        adapter_of(
            combine([open_adapter(folders / n) for n in "ab"], method=method, weights=[0.6, 0.9], density=density)
        )
    )
    for name, module in live.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "mix" in module.lora_A:
            want = module.get_delta_weight("mix").detach().double()
            assert (made[name] - want).abs().max() <= 2e-6 * want.abs().max(), name


def test_dare_is_seeded_and_unbiased(folders):
    a = open_adapter(folders / "a")

    def first(seed):
        bundle = combine([a], method="dare_linear", density=0.5, seed=seed)
        return next(iter(bundle.tensors.values())).load()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    whole = next(iter(combine([a], method="cat").tensors.values())).load()
    kept = first(1) != 0
    assert torch.allclose(first(1)[kept], 2 * whole[kept])
    assert 0.3 < kept.float().mean() < 0.7


def test_the_written_adapter_is_read_by_peft(folders, tmp_path):
    made = combine([open_adapter(folders / n) for n in "aepe"], method="cat", weights=[1, 0.5, -1, 2])
    llmkit.save(made, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "llmkit.json",
    ]  # fmt: skip
    ids = torch.arange(12).view(2, 6)
    merged = merge(world.open_base(folders / "base"), [adapter_of(made)])
    llmkit.save(merged, tmp_path / "merged")
    live = world.live_logits(folders / "base", tmp_path / "out", ids)
    assert (world.folder_logits(tmp_path / "merged", ids) - live).abs().max() < 1e-5


def test_combine_refuses_what_no_formula_covers(folders, tmp_path):
    model = world.llama()
    world.train(model, LoraConfig(r=4, use_dora=True, target_modules=TARGETS), tmp_path / "dora")
    with pytest.raises(RequirementError, match="DoRA rescales each row"):
        combine([open_adapter(tmp_path / "dora")])
    with pytest.raises(SpecError, match="linear needs equal ranks") as caught:
        combine([open_adapter(folders / "a"), open_adapter(folders / "c")], method="linear")
    assert "cat or svd" in caught.value.hint
    with pytest.raises(RequirementError, match="keeps a share") as caught:
        combine([open_adapter(folders / "a")], method="ties")
    assert caught.value.hint == "--density 0.5"
    with pytest.raises(RequirementError, match="unknown method"):
        combine([open_adapter(folders / "a")], method="average")


def test_svd_tells_what_it_lost(folders):
    adapters = [open_adapter(folders / n) for n in ("a", "c")]
    meter = Meter()
    made = adapter_of(combine(adapters, method="svd", rank=2, meter=meter))
    exact, found = updates(adapter_of(combine(adapters))), updates(made)
    for measured in meter.measured():
        want = (exact[measured.name] - found[measured.name]).norm() / exact[measured.name].norm()
        assert math.isclose(measured.relative_error, want, rel_tol=1e-5)
    assert len(meter.measured()) == len(found)


def test_fan_in_fan_out_says_nothing_of_the_factors(folders, tmp_path):
    """It says how the base stores its matrices, and PEFT corrects it when it loads."""
    for name, flag in (("a", True), ("c", False)):
        shutil.copytree(folders / name, tmp_path / name)
        world.edit_config(tmp_path / name, fan_in_fan_out=flag)
    found = updates(adapter_of(combine([open_adapter(tmp_path / n) for n in ("a", "c")])))
    assert_close(found, updates(adapter_of(combine([open_adapter(folders / n) for n in ("a", "c")]))), tol=0)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base and a fully tuned model: two layers, a norm and the embedding changed, the rest did not."""
    folder = tmp_path_factory.mktemp("extract")
    model = world.llama()
    world.save_base(model, folder / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("q_proj", "down_proj", "up_proj")):
                rank = 3 if "layers.0" in name else 6
                p.add_(0.05 * torch.randn(p.shape[0], rank) @ torch.randn(rank, p.shape[1]))
            elif name in ("model.norm.weight", "model.embed_tokens.weight"):
                p.add_(0.1 * torch.randn_like(p))
    world.save_base(model, folder / "tuned")
    return folder


def test_extract_of_full_rank_gives_the_tuned_model_in_peft(tuned, tmp_path):
    base, target = world.open_base(tuned / "base"), world.open_base(tuned / "tuned")
    meter = Meter()
    made = extract(base, target, rank=6, meter=meter)
    llmkit.save(made, tmp_path / "adapter")
    assert max(m.relative_error for m in meter.measured()) < 1e-5
    ids = torch.arange(12).view(2, 6)
    live = world.live_logits(tuned / "base", tmp_path / "adapter", ids)
    assert (live - world.folder_logits(tuned / "tuned", ids)).abs().max() < 1e-4
    assert any("model.norm.weight" in n and "model.embed_tokens.weight" in n for n in made.notes)


@pytest.mark.parametrize("part", ["q_proj", "q_proj.bias", "norm"])
def test_what_is_stored_whole_loads_in_peft(tmp_path, part):
    model = world.llama(biased=True)
    base = world.save_base(model, tmp_path / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name:
                p.add_(0.1 * torch.randn_like(p))
    tuned = world.save_base(model, tmp_path / "tuned")
    llmkit.save(extract(world.open_base(base), world.open_base(tuned), rank=64), tmp_path / "adapter")
    ids = torch.arange(12).view(2, 6)
    expected = world.folder_logits(tuned, ids)
    assert (world.live_logits(base, tmp_path / "adapter", ids) - expected).abs().max() < 1e-4
    again = combine([open_adapter(tmp_path / "adapter")])
    llmkit.save(again, tmp_path / "again")
    assert (world.live_logits(base, tmp_path / "again", ids) - expected).abs().max() < 1e-4
    llmkit.save(merge(world.open_base(base), [open_adapter(tmp_path / "again")]), tmp_path / "out")
    assert (world.folder_logits(tmp_path / "out", ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_a_module_whose_own_parameter_changed_is_stored_with_all_that_is_in_it(tmp_path, layers):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    base = world.save_base(model, tmp_path / "base")
    changed = ("in_proj.weight", "conv1d.weight", *(f"layers.{i}.mixer.A_log" for i in layers))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(changed):
                p.add_(0.1 * torch.randn_like(p))
    tuned = world.save_base(model, tmp_path / "tuned")
    opened = world.open_base(base), world.open_base(tuned)
    if len(layers) == 2:
        with pytest.raises(RequirementError, match=r"mixer\.A_log changed, and PEFT saves a module whole"):
            extract(*opened, rank=16)
        return
    llmkit.save(extract(*opened, rank=16), tmp_path / "adapter")
    ids = torch.arange(12).view(2, 6)
    expected = world.folder_logits(tuned, ids)
    assert (world.live_logits(base, tmp_path / "adapter", ids) - expected).abs().max() < 1e-4
    llmkit.save(merge(opened[0], [open_adapter(tmp_path / "adapter")]), tmp_path / "out")
    assert (world.folder_logits(tmp_path / "out", ids) - expected).abs().max() < 1e-4


def test_extract_is_the_best_of_its_rank_and_says_how_near(tuned):
    base, target = world.open_base(tuned / "base"), world.open_base(tuned / "tuned")
    meter = Meter()
    made = extract(base, target, rank=2, meter=meter)
    found = updates(adapter_of(made))
    for module, update in found.items():
        delta = target.tensors[f"{module}.weight"].load().double() - base.tensors[f"{module}.weight"].load().double()
        s = torch.linalg.svdvals(delta)
        assert torch.linalg.norm(delta - update) == pytest.approx(float(s[2:].norm()), rel=1e-5), module
        expected = float(s[2:].norm() / s.norm())
        assert {m.name: m.relative_error for m in meter.measured()}[module] == pytest.approx(expected, rel=1e-4)


def test_energy_chooses_the_rank_of_each_layer(tuned):
    base, target = world.open_base(tuned / "base"), world.open_base(tuned / "tuned")
    found = survey(base, target, energy=0.8)
    assert found.unchanged > 5
    for name, rank in found.ranks.items():
        squares = torch.linalg.svdvals(target.tensors[name].load().double() - base.tensors[name].load().double()) ** 2
        share = squares.cumsum(0) / squares.sum()
        assert share[rank - 1] >= 0.8
        assert rank == 1 or share[rank - 2] < 0.8
    made = adapter_of(extract(base, target, energy=0.8, found=found))
    assert made.ranks == {n.removesuffix(".weight"): r for n, r in found.ranks.items()}
    assert all(math.isclose(s, 1.0) for s in made.scaling.values())


def test_extract_refuses(tuned):
    base = world.open_base(tuned / "base")
    with pytest.raises(RequirementError, match="nothing to extract"):
        extract(base, base, rank=2)
    with pytest.raises(RequirementError, match="either a rank or an energy") as caught:
        extract(base, world.open_base(tuned / "tuned"))
    broken = world.open_base(tuned / "tuned")
    name = "model.layers.0.self_attn.q_proj.weight"
    lazy = broken.tensors[name]
    nan = Apply("nan", [lazy], lazy.spec, lambda x: x.masked_fill(x == x[0, 0], torch.nan)).output()
    adapter = extract(base, broken.derive(tensors={**broken.tensors, name: nan}), rank=2)
    with pytest.raises(InputError, match="q_proj: its weights, or those it was tuned from, hold NaN"):
        adapter.tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"].load()
    assert "--rank 16" in caught.value.hint
