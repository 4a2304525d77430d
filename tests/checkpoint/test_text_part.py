"""The decoder inside a model of text and images, against transformers' whole model given text alone."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmkit.api import save
from llmkit.architecture.registry import default_registry
from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.checkpoint.text_part import text_part
from llmkit.checkpoint.tokenizer import end_tokens
from llmkit.decoder.contract import random_checkpoint
from llmkit.decoder.foreign import quiet_transformers
from llmkit.decoder.load import load_decoder
from llmkit.errors import RequirementError
from llmkit.inspection.summary import summarize
from llmkit.transforms.convert import convert
from llmkit.transforms.quantize import quantize

PLUGINS = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}
IMAGES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
WHOLE = {
    "gemma3": ("Gemma3ForConditionalGeneration", "gemma3", {"mm_tokens_per_image": 4, "image_token_index": 90}),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        "gemma4",
        {"image_token_id": 90, "audio_token_id": 91, "video_token_id": 92, "audio_config": None},
    ),
    "llama": ("LlavaForConditionalGeneration", "llava", {"image_token_index": 90}),
    "llama4": ("Llama4ForConditionalGeneration", "llama4", {"image_token_index": 90}),
    "ministral3": ("Mistral3ForConditionalGeneration", "mistral3", {"image_token_index": 90}),
    "mistral": ("Mistral3ForConditionalGeneration", "mistral3", {"image_token_index": 90}),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", {"image_token_id": 90}),
}
SCALED = {
    "cohere2": ("AyaVisionForConditionalGeneration", "aya_vision", {"image_token_index": 90}),
    "granite": ("LlavaNextForConditionalGeneration", "llava_next", {"image_token_index": 90}),
}
KINDS_OF_IMAGES = {"gemma4": "gemma4_vision", "llama4": "llama4_vision_model", "mistral3": "pixtral",
                   "qwen3_5_moe": "qwen3_5_moe_vision"}  # fmt: skip
OLD = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
       "model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector."}  # fmt: skip


def written(folder, family):
    name, model_type, more = (WHOLE | SCALED)[family]
    if not hasattr(transformers, PLUGINS[family].matches[0]):
        pytest.skip(f"transformers {transformers.__version__} has no {PLUGINS[family].matches[0]}")
    text = PLUGINS[family].tiny_config()
    text.pop("architectures")
    if family == "granite":  # transformers 4 ties as the text's config says, 5 as the whole one
        text["tie_word_embeddings"] = False
    images = {"model_type": KINDS_OF_IMAGES.get(model_type, "siglip_vision_model"), **IMAGES}
    if model_type == "gemma4":
        images |= {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
    if model_type == "qwen3_5_moe":
        images |= {"depth": 1, "num_heads": 2, "out_hidden_size": text["hidden_size"]}
    config = transformers.AutoConfig.for_model(model_type, text_config=text, vision_config=images, **more)
    torch.manual_seed(0)
    with quiet_transformers():
        model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("names", ["today's", "old"])
@pytest.mark.parametrize("family", WHOLE)
def test_text_is_computed_as_transformers_does(tmp_path, family, names):
    model = written(tmp_path, family)
    if names == "old":
        stored = load_file(tmp_path / "model.safetensors")
        start = {name: next((b for b in OLD if name.startswith(b)), "") for name in stored}
        old = {OLD.get(start[n], "") + n.removeprefix(start[n]): t for n, t in stored.items()}
        save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ckpt = open_checkpoint(tmp_path)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        # transformers' whole Llama 4 expects outputs of images even where there are none.
        wanted = (model.language_model if family == "llama4" else model)(input_ids=ids).logits
    torch.testing.assert_close(load_decoder(ckpt)(ids), wanted, atol=2e-5, rtol=2e-5)
    part = text_part(ckpt)
    (note,) = part.notes
    assert note.startswith(f"the text part of {tmp_path.name} ({family}); ")
    assert text_part(part) is part
    shown = summarize(ckpt)
    assert (shown.architecture, shown.problems) == (family, ())
    assert note in shown.oddities
    assert set(convert(ckpt, to="bin").tensors) == set(ckpt.tensors)  # of the whole nothing is lost


@pytest.mark.parametrize("family", SCALED)
def test_logits_have_the_scale_of_the_text_model(tmp_path, family):
    """As in transformers 4.51, whose whole models held the causal one; since 4.52 they hold its layers alone."""
    model = written(tmp_path, family)
    text = model.config.text_config
    text.tie_word_embeddings = model.config.tie_word_embeddings
    causal = transformers.AutoModelForCausalLM.from_config(text, attn_implementation="eager").eval()
    causal.model.load_state_dict(model.model.language_model.state_dict())
    causal.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        wanted = causal(input_ids=ids).logits
    torch.testing.assert_close(load_decoder(open_checkpoint(tmp_path))(ids), wanted, atol=2e-5, rtol=2e-5)


def test_a_text_model_of_smolvlm(tmp_path):
    text = {k: v for k, v in PLUGINS["llama"].tiny_config().items() if k != "architectures"}
    config = transformers.SmolVLMConfig(text_config=text, vision_config=IMAGES, image_token_id=90, pad_token_id=0)
    torch.manual_seed(0)
    with quiet_transformers():
        model = transformers.SmolVLMForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
        model.save_pretrained(tmp_path)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
    torch.testing.assert_close(load_decoder(open_checkpoint(tmp_path))(ids), wanted, atol=2e-5, rtol=2e-5)


def test_stacked_experts_are_read_one_by_one(tmp_path):
    """As published Qwen3.5 has them, and transformers 5 in memory; its own files have them one by one."""
    model = written(tmp_path, "qwen3_5_moe")
    stacked = {name: t.contiguous() for name, t in model.state_dict().items()}
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in stacked
    save_file(stacked, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
    part = text_part(open_checkpoint(tmp_path))
    assert part.tensors["model.layers.0.mlp.experts.5.down_proj.weight"].shape == (32, 16)
    torch.testing.assert_close(load_decoder(part)(ids), wanted, atol=2e-5, rtol=2e-5)
    inner = {name: lazy.load() for name, lazy in part.tensors.items() if ".experts." not in name}
    inner |= {n.replace("language_model.", ""): t for n, t in stacked.items() if ".experts." in n}
    save_file(inner, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(part.config))
    again = open_checkpoint(tmp_path)
    assert set(again.tensors) == set(part.tensors)
    torch.testing.assert_close(load_decoder(again)(ids), wanted, atol=2e-5, rtol=2e-5)


def test_what_the_text_config_leaves_to_its_class_is_read_from_transformers(tmp_path):
    model = written(tmp_path, "gemma3")
    config = json.loads((tmp_path / "config.json").read_text())
    default = transformers.Gemma3TextConfig().to_dict()
    gone = [k for k in ("hidden_activation", "rms_norm_eps") if config["text_config"][k] == default[k]]
    assert gone
    for key in (*gone, "rope_local_base_freq"):
        config["text_config"].pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
    torch.testing.assert_close(load_decoder(open_checkpoint(tmp_path))(ids), wanted, atol=2e-5, rtol=2e-5)


def test_a_head_that_only_the_text_config_ties_is_the_one_that_is_stored(tmp_path):
    model = written(tmp_path, "gemma3")
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings")
    config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.arange(3, 19)[None]
    decoder = load_decoder(open_checkpoint(tmp_path), dtype="float32")
    assert (decoder(ids) - model(input_ids=ids).logits).abs().max() < 1e-4


OF_INNER = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 leaves it at random")


@pytest.mark.parametrize(
    ("family", "outer", "inner"), [("mistral", None, False), pytest.param("llama", False, True, marks=OF_INNER)]
)
def test_a_head_that_is_not_stored_is_tied_as_the_whole_class_ties_it(tmp_path, family, outer, inner):
    """Mistral 3's class ties where its config is silent; Llava's as the text's config says, as older ones had it."""
    model = written(tmp_path, family)
    if family == "llama":
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = outer, inner
    stated = {k: v for k, v in config.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    ids = torch.arange(3, 27).view(2, 12)
    with quiet_transformers(), torch.inference_mode():
        wanted = type(model).from_pretrained(tmp_path, attn_implementation="eager")(input_ids=ids).logits
    torch.testing.assert_close(load_decoder(open_checkpoint(tmp_path))(ids), wanted, atol=2e-5, rtol=2e-5)


def test_what_the_whole_config_states_wins_over_defaults_of_the_texts_class(tmp_path):
    """The published Gemma 3 states its ends of text outside, and of its text's sizes some."""
    text = {k: v for k, v in PLUGINS["gemma3"].tiny_config().items() if k not in ("eos_token_id", "rms_norm_eps")}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 90]}
    tensors = random_checkpoint(PLUGINS["gemma3"], PLUGINS["gemma3"].tiny_config()).tensors
    ckpt = Checkpoint("m", tensors, config | {"dtype": "bfloat16", "text_config": text}, {})
    assert {k: text_part(ckpt).config[k] for k in ("eos_token_id", "dtype")} == {
        "eos_token_id": [1, 90],
        "dtype": "bfloat16",
    }
    inner = Checkpoint("m", {}, {"text_config": text | {"eos_token_id": 7}, "eos_token_id": None}, {})
    assert end_tokens(inner) == [7]


def test_a_text_part_that_no_plugin_describes_is_refused(tmp_path):
    written(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "unheard"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequirementError, match="LlavaForConditionalGeneration"):
        load_decoder(open_checkpoint(tmp_path))


def test_published_files_have_keys_where_layers_take_those_of_others(tmp_path):
    """Gemma 3n's, whose towers are timm's: the text part alone, named and nested as published."""
    architecture = PLUGINS["gemma3n"]
    plain = random_checkpoint(architecture, architecture.tiny_config())
    tensors = {n.replace("model.", "model.language_model.", 1): t.load() for n, t in plain.tensors.items()}
    for part in ("k_proj", "v_proj", "k_norm"):
        name = "model.language_model.layers.{}.self_attn." + f"{part}.weight"
        assert name.format(3) not in tensors
        tensors[name.format(3)] = tensors[name.format(0)] + 1
    tensors["model.vision_tower.x.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": architecture.tiny_config()}))
    ids = torch.arange(3, 27).view(2, 12)
    whole = open_checkpoint(tmp_path)
    torch.testing.assert_close(load_decoder(whole)(ids), load_decoder(plain)(ids), atol=0, rtol=0)
    assert set(convert(whole, to="bin").tensors) == tensors.keys()


def test_the_language_model_of_a_model_of_images_has_them_one_by_one(tmp_path):
    written(tmp_path / "base", "llama4")
    only = ["*language_model*feed_forward*_proj"]
    save(
        quantize(open_checkpoint(tmp_path / "base"), bits=4, group_size="channel", only=only, method="rtn"),
        tmp_path / "q",
    )
    ids = torch.arange(3, 27).view(2, 12)
    quantized = open_checkpoint(tmp_path / "q")
    assert any(name.endswith("layers.1.feed_forward.experts.2.gate_proj.weight_packed") for name in quantized.tensors)
    with quiet_transformers(), torch.no_grad():
        options = {"attn_implementation": "eager", "dtype": torch.float32}
        model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "q", **options)
        theirs = model.eval().language_model(input_ids=ids).logits
    torch.testing.assert_close(load_decoder(quantized)(ids), theirs, atol=2e-5, rtol=2e-5)
