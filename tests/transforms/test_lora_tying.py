"""Adapters at the two ends of a model, tied or not: what PEFT's live model computes, or a refusal by name."""

from __future__ import annotations

import json
import warnings

import peft_world as world
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    BertConfig,
    BloomConfig,
    Gemma3Config,
    GPTNeoXConfig,
    T5Config,
)  # fmt: skip

import llmkit
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import RequirementError
from llmkit.transforms.lora import merge, open_adapter
from llmkit.transforms.lora.extract import extract

IDS = torch.arange(20).view(2, 10)
SIZES = {"vocab_size": world.VOCAB, "hidden_size": 32}


def bloom():
    return BloomConfig(**SIZES, n_layer=1, n_head=4)


def gpt_neox(tied):
    return GPTNeoXConfig(
        **SIZES, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, tie_word_embeddings=tied
    )


MODELS = {
    "llama": lambda: world.llama(tied=True),
    "llama-untied": world.llama,
    "gpt2": world.gpt2,
    "bloom": lambda: made(bloom()),
    "gpt_neox": lambda: made(gpt_neox(True)),
    "gpt_neox-untied": lambda: made(gpt_neox(False)),
}
# Names of a layer, the embedding and the head.
NAMES = {
    "llama": ("q_proj", "embed_tokens", "lm_head"), "gpt2": ("c_attn", "wte", "lm_head"),
    "bloom": ("query_key_value", "word_embeddings", "lm_head"),
    "gpt_neox": ("query_key_value", "embed_in", "lm_head"),  # the head's name in memory; embed_out in files
}  # fmt: skip
CHANGES = {
    "embedding saved": lambda q, e, h: {"modules_to_save": [e]},
    "head saved": lambda q, e, h: {"modules_to_save": [h]},
    "both saved": lambda q, e, h: {"modules_to_save": [e, h]},
    "embedding saved, tying asked": lambda q, e, h: {"modules_to_save": [e], "ensure_weight_tying": True},
    "both saved, tying asked": lambda q, e, h: {"modules_to_save": [e, h], "ensure_weight_tying": True},
    "embedding": lambda q, e, h: {"target_modules": [q, e]},
    "head": lambda q, e, h: {"target_modules": [q, h]},
    "both": lambda q, e, h: {"target_modules": [q, e, h]},
    "embedding, tying asked": lambda q, e, h: {"target_modules": [q, e], "ensure_weight_tying": True},
    "pattern, tying asked": lambda q, e, h: {"target_modules": f".*({q}|{e})", "ensure_weight_tying": True},
    "dora, tying asked": lambda q, e, h: {"target_modules": [q, e], "use_dora": True, "ensure_weight_tying": True},
    "dora on both": lambda q, e, h: {"target_modules": [q, e, h], "use_dora": True},
    "rows": lambda q, e, h: {"trainable_token_indices": [3, 6]},
    "rows of both": lambda q, e, h: {"trainable_token_indices": {e: [3, 6], h: [3, 6]}},
    "other rows of both": lambda q, e, h: {"trainable_token_indices": {e: [3, 6], h: [6, 9]}},
    "rows of the head": lambda q, e, h: {"trainable_token_indices": {h: [3, 6]}},
    "rows and head": lambda q, e, h: {"target_modules": [q, h], "trainable_token_indices": [3, 6]},
    "rows and dora head": lambda q, e, h: {
        "target_modules": [q, h], "use_dora": True, "trainable_token_indices": [3, 6],
    },
    "rows and head saved": lambda q, e, h: {"modules_to_save": [h], "trainable_token_indices": [3, 6]},
}  # fmt: skip


def made(config, auto=AutoModelForCausalLM):
    torch.manual_seed(0)
    return world.spread(auto.from_config(config).eval())


def names_of(family):
    return NAMES[family.partition("-")[0]]


def config_of(family, change, **more):
    names = names_of(family)
    return LoraConfig(**{"r": 4, "target_modules": [names[0]], **CHANGES[change](*names), **more})


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def merged_logits(base, adapter, out, ids=IDS, auto=AutoModelForCausalLM):
    """Transformers' logits of the merged folder, which it must find whole."""
    ckpt = merge(open_checkpoint(base), [open_adapter(adapter)])
    llmkit.save(ckpt, out)
    model, report = auto.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return logits(model, ids), ckpt


# What PEFT ties by name, or by a name that it does not know; the rest is tried on one family.
TELLING = (
    "embedding saved, tying asked", "pattern, tying asked", "dora, tying asked", "rows of both", "rows and head",
)  # fmt: skip
CASES = [("llama", c) for c in CHANGES] + [(f, c) for f in MODELS if f != "llama" for c in TELLING]


@pytest.mark.parametrize(("family", "change"), CASES, ids=lambda word: word.replace(" ", "-"))
def test_the_ends_are_those_of_the_live_model(tmp_path, family, change):
    model = MODELS[family]()
    base = world.save_base(model, tmp_path / "base")
    try:
        expected = logits(world.train(model, config_of(family, change), tmp_path / "adapter"))
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"PEFT: {error}")
    found, ckpt = merged_logits(base, tmp_path / "adapter", tmp_path / "out")
    assert (found - expected).abs().max() < 1e-4
    assert (logits(model) - expected).abs().max() > 1e-3
    head = load_file(tmp_path / "out/model.safetensors").keys() & {"lm_head.weight", "embed_out.weight"}
    assert bool(head) is not bool(ckpt.config["tie_word_embeddings"])


# Tokens added as PEFT documents it: the vocabulary grows, and only the new rows are trained.

NEW = [72, 73, 74]
GROWN_IDS = torch.cat([IDS, torch.tensor([NEW, NEW])], 1)


def grown(model, base, config, folder):
    """The live model's logits; the base's folder is left as it was."""
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    live.resize_token_embeddings(len(NEW) + world.VOCAB, mean_resizing=False)
    return logits(world.train(live, config, folder), GROWN_IDS)


@pytest.mark.parametrize("is_stored", [True, False], ids=["resized-rows-stored", "trained-rows-only"])
@pytest.mark.parametrize("options", [{}, {"head": True}, {"named": True}], ids=["rows", "rows-and-head", "named"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-untied"])
def test_tokens_added_and_trained_alone(tmp_path, family, options, is_stored):
    layer, embed, head = names_of(family)
    base = world.save_base(MODELS[family](), tmp_path / "base")
    config = LoraConfig(
        r=4, target_modules=[layer, *([head] if options.get("head") else [])],
        trainable_token_indices={embed: NEW} if options.get("named") else NEW,
    )  # fmt: skip
    expected = grown(MODELS[family](), base, config, tmp_path / "adapter")
    (tmp_path / "adapter/tokenizer.json").write_text(vocabulary(75))
    (base / "tokenizer.json").write_text(vocabulary(72))
    if not is_stored:  # as PEFT saves it where it cannot see that the vocabulary grew (an unreachable base)
        weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
        rows = {n: t for n, t in weights.items() if "token_adapter.base_layer" not in n and "lm_head.token" not in n}
        save_file(rows, tmp_path / "adapter/adapter_model.safetensors")
    if family == "llama-untied" and not is_stored and options.get("head"):
        pytest.skip("the head's new rows are needed and are stored all the same")
    found, ckpt = merged_logits(base, tmp_path / "adapter", tmp_path / "out", GROWN_IDS)
    assert (found - expected).abs().max() < 1e-4
    assert ckpt.config["vocab_size"] == 75
    assert ckpt.files["tokenizer.json"].read() == vocabulary(75).encode()


def vocabulary(n):
    vocab = {f"t{i}": i for i in range(n)}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}})


def test_a_head_that_grew_under_an_update_brings_the_rows_of_the_tied_embedding(tmp_path):
    base = world.save_base(world.llama(tied=True), tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    expected = grown(None, base, config, tmp_path / "adapter")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/tokenizer.json").write_text(vocabulary(75))
    found, _ = merged_logits(base, tmp_path / "adapter", tmp_path / "out", GROWN_IDS)
    assert (found - expected).abs().max() < 1e-4


def test_rows_that_leave_a_gap_are_no_vocabulary(tmp_path):
    base = world.save_base(world.llama(tied=True), tmp_path / "base")
    grown(None, base, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[74]), tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    rows = {n: t for n, t in weights.items() if "base_layer" not in n}
    save_file(rows, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/tokenizer.json").write_text(vocabulary(75))
    with pytest.raises(llmkit.errors.SpecError, match="74"):
        merge(open_checkpoint(base), [open_adapter(tmp_path / "adapter")])


# Heads of classes that no plugin describes.


def bert():
    return BertConfig(**SIZES, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)


def t5(tied):
    return T5Config(
        vocab_size=world.VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, tie_word_embeddings=tied
    )


@pytest.mark.parametrize(
    ("options", "stays_tied"),
    [
        ({"modules_to_save": ["word_embeddings"]}, False),
        ({"target_modules": ["query", "word_embeddings"]}, False),
        ({"trainable_token_indices": [3, 6]}, True),
    ],
)
def test_a_head_has_the_name_that_its_class_gives_it(tmp_path, options, stays_tied):
    model = made(bert(), AutoModelForMaskedLM)
    torch.nn.init.zeros_(model.cls.predictions.bias)  # PEFT's live rows leave it out
    base = world.save_base(model, tmp_path / "base")
    expected = logits(world.train(model, LoraConfig(**{"target_modules": ["query"], **options}), tmp_path / "adapter"))
    found, ckpt = merged_logits(base, tmp_path / "adapter", tmp_path / "out", auto=AutoModelForMaskedLM)
    assert (found - expected).abs().max() < 1e-4
    assert ("cls.predictions.decoder.weight" not in ckpt.tensors) is stays_tied
    assert not any("lm_head" in name for name in ckpt.tensors)


def test_a_class_that_computes_otherwise_when_untied_is_refused(tmp_path):
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(t5(True)).eval()
    base = world.save_base(model, tmp_path / "base")
    config = LoraConfig(target_modules=["q"], modules_to_save=["shared"])
    world.train(model, config, tmp_path / "adapter")
    with pytest.raises(RequirementError, match="tied to it are lm_head"):
        merge(open_checkpoint(base), [open_adapter(tmp_path / "adapter")])


def test_a_tied_head_of_no_known_name_is_refused(tmp_path):
    model = made(bert(), AutoModelForMaskedLM)
    base = world.save_base(model, tmp_path / "base")
    world.train(model, LoraConfig(target_modules=["query"], modules_to_save=["word_embeddings"]), tmp_path / "adapter")
    changed = json.loads((base / "config.json").read_text()) | {"model_type": "unheard", "architectures": ["Unheard"]}
    (base / "config.json").write_text(json.dumps(changed))
    with pytest.raises(RequirementError, match="under which name") as caught:
        merge(open_checkpoint(base), [open_adapter(tmp_path / "adapter")])
    assert "plugins new" in caught.value.hint


# Adapters taken from tuned models give these back.


@pytest.mark.parametrize("family", MODELS)
def test_what_is_extracted_gives_the_tuned_model_back(tmp_path, family):
    base_model, tuned_model = MODELS[family](), MODELS[family]()
    with torch.no_grad():
        for p in tuned_model.parameters():
            p.add_(0.05 * torch.randn_like(p) * (p.dim() == 2))
    base, tuned = (world.save_base(m, tmp_path / n) for m, n in ((base_model, "base"), (tuned_model, "tuned")))
    adapter = extract(open_checkpoint(base), open_checkpoint(tuned), rank=128)
    llmkit.save(adapter, tmp_path / "adapter")
    found, ckpt = merged_logits(base, tmp_path / "adapter", tmp_path / "out")
    expected = logits(tuned_model)
    assert (logits(base_model) - expected).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-3
    assert bool(ckpt.config["tie_word_embeddings"]) is bool(base_model.config.tie_word_embeddings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (world.live_logits(base, tmp_path / "adapter", IDS) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)], ids=["untied", "tied"])
def test_a_tuning_that_changed_the_tie_is_extracted(tmp_path, before, after):
    base = world.save_base(world.llama(tied=before), tmp_path / "base")
    tuned_model = world.llama(tied=after, seed=5)
    tuned = world.save_base(tuned_model, tmp_path / "tuned")
    llmkit.save(extract(open_checkpoint(base), open_checkpoint(tuned), rank=128), tmp_path / "adapter")
    found, _ = merged_logits(base, tmp_path / "adapter", tmp_path / "out")
    assert (found - logits(tuned_model)).abs().max() < 1e-3


# The language model inside one of several modalities: files name it as older transformers did, PEFT as today's.


def gemma3(tied):
    text = {"model_type": "gemma3_text", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4, tie_word_embeddings=tied)
    return made(config, AutoModelForImageTextToText)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4], "modules_to_save": ["multi_modal_projector"]},
    ],
    ids=["vision too", "head", "embedding", "ends saved", "rows, projector saved"],
)  # fmt: skip
def test_parts_of_a_model_of_several_modalities_are_found(tmp_path, options, tied):
    model = gemma3(tied)
    base = world.save_base(model, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = world.train(model, LoraConfig(r=4, **options), tmp_path / "adapter")
    found, _ = merged_logits(base, tmp_path / "adapter", tmp_path / "out", auto=AutoModelForImageTextToText)
    assert (found - logits(live)).abs().max() < 1e-4
