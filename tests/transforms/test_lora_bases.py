"""What a merge does to the whole model: tied ends, vocabularies, names, dtypes, order, and what it refuses."""

from __future__ import annotations

import json

import peft_world as world
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import InputError, RequirementError, SpecError
from llmkit.quantization.quality import Meter
from llmkit.tensors.lazy import Context
from llmkit.transforms.lora import merge, open_adapter
from llmkit.transforms.lora.arithmetic import BLOCK_ROWS
from llmkit.transforms.lora.names import OTHER_BASE

IDS = torch.arange(20).view(2, 10) * 3
Q = ["q_proj"]


def merged_logits(base, adapters, out, **options):
    made = merge(open_checkpoint(base), [open_adapter(a) for a in adapters], **options)
    llmkit.save(made, out)
    return world.folder_logits(out, IDS)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "options", "stays_tied"),
    [
        ("head lora", {"target_modules": [*Q, "lm_head"]}, False),
        ("head saved", {"target_modules": Q, "modules_to_save": ["lm_head"]}, False),
        ("embedding lora", {"target_modules": [*Q, "embed_tokens"]}, False),
        ("embedding saved", {"target_modules": Q, "modules_to_save": ["embed_tokens"]}, False),
        ("both saved", {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ("tokens", {"target_modules": Q, "trainable_token_indices": [3, 6]}, True),
        ("layers only", {"target_modules": Q}, True),
    ],
)
def test_a_tied_model_does_what_the_live_model_does(tmp_path, name, options, stays_tied):
    model = world.llama(tied=True)
    base = world.save_base(model, tmp_path / "base")
    world.train(model, LoraConfig(r=4, **options), tmp_path / "adapter")
    live = world.live_logits(base, tmp_path / "adapter", IDS)
    found = merged_logits(base, [tmp_path / "adapter"], tmp_path / "out")
    assert (found - live).abs().max() < 1e-5
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is stays_tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not stays_tied
    assert (world.folder_logits(base, IDS) - live).abs().max() > 1e-3


def test_ties_that_training_kept_are_kept(tmp_path):
    model = world.llama(tied=True)
    base = world.save_base(model, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    world.train(model, config, tmp_path / "adapter")
    made = merge(open_checkpoint(base), [open_adapter(tmp_path / "adapter")])
    assert "lm_head.weight" not in made.tensors
    assert made.config["tie_word_embeddings"] is True
    assert any("stays tied" in n for n in made.notes)


# Names, order, slices, errors.


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    model = world.llama()
    world.save_base(model, folder / "base", torch.float16)
    world.train(model, LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]), folder / "one", seed=1)
    world.train(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "lm_head"]), folder / "two", seed=2)
    world.train(model, IA3Config(target_modules=["q_proj"], feedforward_modules=[]), folder / "three", seed=3)
    return folder


def test_composed_is_staged_bit_for_bit(pair, tmp_path):
    adapters = [open_adapter(pair / n) for n in ("one", "two", "three")]
    llmkit.save(merge(open_checkpoint(pair / "base"), adapters, dtype="bfloat16"), tmp_path / "once")
    staged = pair / "base"
    for i, adapter in enumerate(adapters):
        made = merge(open_checkpoint(staged), [adapter], dtype="bfloat16" if i == 0 else None)
        llmkit.save(made, tmp_path / str(i))
        staged = tmp_path / str(i)
    assert (staged / "model.safetensors").read_bytes() == (tmp_path / "once" / "model.safetensors").read_bytes()
    assert config_of(tmp_path / "once") == config_of(staged)
    recipes = [json.loads((f / "llmkit.json").read_text())["recipe"] for f in (staged, tmp_path / "once")]
    assert recipes[0] == recipes[1]


def test_delta_then_adapters_in_one_plan_is_staged_bit_for_bit(pair, tmp_path):
    from llmkit.transforms import delta

    tuned = world.save_base(world.spread(world.llama(), 0.01), tmp_path / "tuned", torch.float16)
    base = open_checkpoint(pair / "base")
    llmkit.save(delta.make(base, open_checkpoint(tuned)), tmp_path / "delta")
    adapters = [open_adapter(pair / n) for n in ("one", "two")]
    applied = delta.apply(base, open_checkpoint(tmp_path / "delta"))
    llmkit.save(merge(applied, adapters), tmp_path / "once")
    llmkit.save(applied, tmp_path / "applied")
    llmkit.save(merge(open_checkpoint(tmp_path / "applied"), adapters), tmp_path / "staged")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "staged" / name).read_bytes(), name


def test_an_adapter_that_takes_back_what_another_changed_says_so(tmp_path):
    base = world.save_base(world.llama(), tmp_path / "base")
    for name, seed in (("one", 1), ("two", 2)):
        world.train(world.llama(), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), tmp_path / name, seed)
    one, two = (open_adapter(tmp_path / name) for name in ("one", "two"))
    assert not merge(world.open_base(base), [one]).warnings
    merged = merge(world.open_base(base), [one, two])
    assert "two holds the model.embed_tokens.weight that it was trained on" in merged.warnings[0]
    rows = load_file(tmp_path / "two/adapter_model.safetensors")
    update = rows["base_model.model.model.embed_tokens.lora_embedding_B"].cpu()
    update = (update @ rows["base_model.model.model.embed_tokens.lora_embedding_A"]).T * 2
    kept = world.open_base(base).tensors["model.embed_tokens.weight"].load() + update
    assert torch.allclose(merged.tensors["model.embed_tokens.weight"].load(), kept, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "named", "words"),
    [
        ("base", None, None),
        ("half", None, None),
        ("other", None, "other is not the model that one was trained on"),
        ("other", "owner/Other-HF", None),
        ("other", "owner/another", "other may be another model than the one"),
    ],
)
def test_a_base_that_is_not_the_one_of_the_adapter_is_said(tmp_path, base, named, words):
    """By what both hold, where the named model is there; else by the names."""
    trained_on = world.save_base(world.llama(), tmp_path / "base")
    world.save_base(world.llama(), tmp_path / "half", torch.float16)
    world.save_base(world.spread(world.llama(), 0.01), tmp_path / "other")
    world.train(world.llama(), LoraConfig(r=4, target_modules=Q), tmp_path / "one")
    path = tmp_path / "one/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named or str(trained_on)}))
    said = merge(open_checkpoint(tmp_path / base), [open_adapter(tmp_path / "one")]).warnings
    assert (words or "") in " ".join(said)
    assert bool(said) == bool(words)


def test_a_slice_has_the_bits_of_the_whole(tmp_path):
    torch.manual_seed(0)
    weight, a, b = torch.randn(333, 130).half(), torch.randn(7, 130), torch.randn(333, 7)
    save_file({"x.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "a").mkdir()
    state = {"base_model.model.x.lora_A.weight": a, "base_model.model.x.lora_B.weight": b}
    save_file(state, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 7, "lora_alpha": 7}))
    merged = merge(open_checkpoint(tmp_path / "model.safetensors"), [open_adapter(tmp_path / "a")]).tensors["x.weight"]
    whole = merged.load()
    for step in (BLOCK_ROWS, 3 * BLOCK_ROWS):
        context = Context()
        parts = [context.rows(merged, (s, min(s + step, 333))) for s in range(0, 333, step)]
        assert torch.equal(torch.cat(parts), whole)


def test_leading_components_of_names_are_reconciled_and_said(pair, tmp_path):
    state = load_file(pair / "base" / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in state.items()}, tmp_path / "model.safetensors")
    expected = merge(open_checkpoint(pair / "base"), [open_adapter(pair / "two")])
    made = merge(open_checkpoint(tmp_path / "model.safetensors"), [open_adapter(pair / "two")])
    assert any("'model.' taken from" in n for n in made.notes)
    name = "layers.1.self_attn.q_proj.weight"
    assert torch.equal(made.tensors[name].load(), expected.tensors[f"model.{name}"].load())


def test_the_meter_tells_how_large_the_change_is(pair):
    base = open_checkpoint(pair / "base")
    for name in ("one", "two", "three"):
        meter = Meter()
        made = merge(base, [open_adapter(pair / name)], meter=meter)
        new = {n: t.load() for n, t in made.tensors.items()}
        assert meter.measured()
        for m in meter.measured():
            old = base.tensors[m.name].load().double()
            expected = float((new[m.name].double() - old).norm() / old.norm())
            assert m.relative_error == pytest.approx(expected, rel=5e-3), m.name  # before the rounding to float16


def test_a_module_that_the_base_lacks_is_an_error_with_the_nearest(pair, tmp_path):
    state = load_file(pair / "two" / "adapter_model.safetensors")
    renamed = {k.replace("layers.1.self_attn.q_proj", "layers.1.self_attn.q_projj"): v for k, v in state.items()}
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(renamed, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((pair / "two" / "adapter_config.json").read_bytes())
    with pytest.raises(SpecError, match="q_projj has no place in base") as caught:
        merge(open_checkpoint(pair / "base"), [open_adapter(folder)])
    assert "nearest module is model.layers.1.self_attn.q_proj" in caught.value.hint


def test_the_head_of_a_classifier_has_no_place_in_a_language_model(pair, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(pair / "base", num_labels=1)
    world.train(model, LoraConfig(r=2, target_modules=Q, task_type="SEQ_CLS"), tmp_path / "a")
    with pytest.raises(SpecError, match="head of a classifier or reward model") as caught:
        merge(open_checkpoint(pair / "base"), [open_adapter(tmp_path / "a")])
    assert "AutoModelForSequenceClassification" in caught.value.hint
    model.save_pretrained(tmp_path / "classifier")
    merged = merge(open_checkpoint(tmp_path / "classifier"), [open_adapter(tmp_path / "a")])
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert torch.equal(merged.tensors["score.weight"].load(), stored["base_model.model.score.weight"].half())


def test_a_name_of_another_family_is_no_nearest_match(pair, tmp_path):
    world.train(world.gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), tmp_path / "a")
    with pytest.raises(SpecError, match="has no place in base") as caught:
        merge(open_checkpoint(pair / "base"), [open_adapter(tmp_path / "a")])
    assert "nearest" not in caught.value.hint
    assert "its modules are such as model.layers.1" in caught.value.hint


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_names_of_wrappers_are_taken_off_a_base(pair, tmp_path, prefix):
    state = load_file(pair / "base" / "model.safetensors")
    wrapped = {prefix + k.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): v for k, v in state.items()}
    save_file(wrapped, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((pair / "base" / "config.json").read_bytes())
    opened = open_checkpoint(tmp_path)
    assert set(opened.tensors) == set(state)
    assert f"{len(state)} names are read without what torch's wrappers added" in opened.notes[0]


def test_another_size_is_an_error(pair, tmp_path):
    import transformers

    config = transformers.LlamaConfig(**{**world.llama().config.to_dict(), "hidden_size": 48})
    world.train(transformers.LlamaForCausalLM(config), LoraConfig(r=2, target_modules=Q), tmp_path / "a")
    with pytest.raises(SpecError, match=r"q_proj is \[32, 48\], .* \[32, 32\]") as caught:
        merge(open_checkpoint(pair / "base"), [open_adapter(tmp_path / "a")])
    assert caught.value.hint == OTHER_BASE


def test_weights_scale_what_is_added_and_nothing_else(pair):
    base = open_checkpoint(pair / "base")
    half = (
        merge(base, [open_adapter(pair / "two")], weights=[0.5])
        .tensors["model.layers.0.self_attn.q_proj.weight"]
        .load()
    )
    parts = open_adapter(pair / "two")
    module = "model.layers.0.self_attn.q_proj"
    b, a = (parts.modules[module][p].load().double() for p in ("lora_B", "lora_A"))
    expected = base.tensors[f"{module}.weight"].load().double() + 0.5 * parts.scaling[module] * b @ a
    assert world.ulps(half, expected.half()) <= 1
    for name, reason in (("one", "DoRA rescales"), ("three", "IA3 multiplies")):
        with pytest.raises(RequirementError, match=reason):
            merge(base, [open_adapter(pair / name)], weights=[0.5])
    with pytest.raises(RequirementError, match="2 weights for 1 adapters"):
        merge(base, [open_adapter(pair / "two")], weights=[1.0, 1.0])


def test_a_quantized_base_is_refused(pair):
    base = open_checkpoint(pair / "base")
    quantized = base.derive(config={**base.config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(RequirementError, match=r"quantized \(int4, gptq\)") as caught:
        merge(quantized, [open_adapter(pair / "two")])
    assert "float checkpoint" in caught.value.hint


def test_nan_in_an_adapter_stops_the_merge(pair, tmp_path):
    state = load_file(pair / "two" / "adapter_model.safetensors")
    next(v for k, v in state.items() if k.endswith("lora_B.weight"))[3, 1] = float("nan")
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((pair / "two" / "adapter_config.json").read_bytes())
    made = merge(open_checkpoint(pair / "base"), [open_adapter(folder)])
    with pytest.raises(InputError, match="nan or infinite") as caught:
        llmkit.save(made, tmp_path / "out")
    assert "diverged" in caught.value.hint
    assert not (tmp_path / "out").exists()


# Folded adapters.


def folded_state(model, *, scaled):
    """Meta's names and its order of rotary pairs, as OpenGVLab/LLaMA-Adapter writes them."""
    torch.manual_seed(5)
    c = model.config
    kv = c.num_key_value_heads * c.head_dim
    state = {}
    for i in range(c.num_hidden_layers):
        sizes = {
            "attention.wq": (32, 32), "attention.wk": (kv, 32), "attention.wv": (kv, 32), "attention.wo": (32, 32),
            "feed_forward.w1": (80, 32), "feed_forward.w2": (32, 80), "feed_forward.w3": (80, 32),
        }  # fmt: skip
        for name, (n_out, n_in) in sizes.items():
            if scaled:
                state[f"layers.{i}.{name}_scale"] = 1 + 0.1 * torch.randn(n_in)
                state[f"layers.{i}.{name}_bias"] = 0.1 * torch.randn(n_out)
            else:
                stem, proj = name.split(".")
                state[f"llama.layers.{i}.{stem}.lora_{proj}_l1.weight"] = 0.1 * torch.randn(4, n_in)
                state[f"llama.layers.{i}.{stem}.lora_{proj}_l2.weight"] = 0.1 * torch.randn(n_out, 4)
                if proj in ("wq", "wo", "w1", "w2", "w3"):
                    state[f"llama.layers.{i}.{name}.bias"] = 0.1 * torch.randn(n_out)
        state[f"{'' if scaled else 'llama.'}layers.{i}.attention_norm.weight"] = 1 + 0.1 * torch.randn(32)
    return state


def interleaved(x, heads):
    """HF's half-split rows in Meta's order: the inverse of transformers' conversion."""
    return x.view(heads, 2, x.shape[0] // heads // 2, -1).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("scaled", [True, False])
def test_folded_parts_compute_what_the_adapter_computes(tmp_path, scaled):
    """The oracle runs each layer with y = W(scale x) + bias + l2(l1 x) in Meta's order of rows, by forward hooks."""
    model = world.llama()
    base = world.save_base(model, tmp_path / "base")
    state = folded_state(model, scaled=scaled)
    torch.save({"model": state}, tmp_path / "adapter.pth")
    found = merged_logits(base, [tmp_path / "adapter.pth"], tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True
    places = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
              "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}  # fmt: skip
    plain = {k.removeprefix("llama."): v for k, v in state.items()}
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.weight.data = plain[f"layers.{i}.attention_norm.weight"]
        for proj, path in places.items():
            stem = f"layers.{i}.{'feed_forward' if proj in ('w1', 'w2', 'w3') else 'attention'}."
            heads = {"wq": 4, "wk": 2}.get(proj)
            module = model.get_submodule(f"model.layers.{i}.{path}")

            def forward(x, module=module, stem=stem, proj=proj, heads=heads):
                weight = interleaved(module.weight, heads) if heads else module.weight
                y = (x * plain.get(f"{stem}{proj}_scale", 1.0)) @ weight.T
                for bias in (f"{stem}{proj}_bias", f"{stem}{proj}.bias"):
                    y = y + plain.get(bias, 0.0)
                if f"{stem}lora_{proj}_l1.weight" in plain:
                    y = y + x @ plain[f"{stem}lora_{proj}_l1.weight"].T @ plain[f"{stem}lora_{proj}_l2.weight"].T
                if not heads:
                    return y
                # back to the order of this model's rotary embedding
                split = y.view(*y.shape[:-1], heads, y.shape[-1] // heads // 2, 2)
                return split.transpose(-1, -2).reshape(y.shape)

            module.forward = forward
    with torch.no_grad():
        expected = model(IDS).logits
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_the_real_model_equals_the_live_peft_model(shallow_smollm2, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shallow_smollm2, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    torch.manual_seed(0)
    live = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in live.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
        ids = torch.randint(0, 49_000, (1, 48))
        expected = live(ids).logits
        with live.disable_adapter():
            plain = live(ids).logits
    live.save_pretrained(tmp_path / "adapter")
    del live, model
    made = merge(open_checkpoint(shallow_smollm2), [open_adapter(tmp_path / "adapter")])
    llmkit.save(made, tmp_path / "out")
    found = world.folder_logits(tmp_path / "out", ids)
    assert (plain - expected).abs().max() > 0.1
    # Logits of this model reach 30: the bound is on what softmax sees, and relative to their size.
    assert (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-5 * expected.abs().max()
