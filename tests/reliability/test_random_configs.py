"""Five random configs of each family: transformers' logits, or a reason that llmkit states.

More: `python tests/reliability/random_configs.py --count 20`.
"""

from __future__ import annotations

import json
import random

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmkit.architecture.unread import unread_keys
from reliability.against_transformers import PLUGINS, described
from reliability.class_keys import keys_read
from reliability.config_draws import random_config
from reliability.random_configs import FAMILIES, trials

SAME = ("aquila", "xverse")  # Llama by another name, and nothing else


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SAME])
def test_random_configs(name):
    found = list(trials(name, 5))
    assert [t for t in found if t.verdict not in ("equal", "refused")] == []
    assert len({str(t.config) for t in found}) == len(found)
    assert sum(t.verdict == "equal" for t in found) >= 2


# What the class reads and no config of a folder states, or what is drawn by another name.
DERIVED = {"get_text_config", "use_return_dict", "kv_sharing_modes", "layers_block_type", "layers_num_experts"}
DERIVED |= {"rope_parameters", "attention_layers", "text_config"}
UNDRAWN = {
    ("gemma3n", "gradient_clipping"): "of training",
    ("gemma4", "per_layer_config"): "a variant of the tiny model has it",
    ("gemma4", "standardize"): "of images",
    ("gemma4", "use_clipped_linears"): "of images and sounds",
    ("granitehybrid", "num_local_experts"): "another number is granitemoehybrid",
    ("smollm3", "layer_types"): "a variant of the tiny model has another",
    **{(name, "layer_types"): "there is one sort" for name in ("falcon_mamba", "mamba", "mamba2")},
    # transformers 4
    ("gpt_neox", "rms_norm_eps"): "of a class that no model is made of",
    ("jamba", "sliding_window"): "of FlashAttention alone",
}


@pytest.mark.parametrize("name", [name for name in FAMILIES if PLUGINS[name].tiny["model_type"] in CONFIG_MAPPING])
def test_what_a_class_reads_is_drawn(name):
    """Each key has two values or more in random configs, is computed at one value only, or changes nothing."""
    family, alias = PLUGINS[name], CONFIG_MAPPING[PLUGINS[name].tiny["model_type"]].attribute_map
    configs = [described(family, random_config(name, random.Random(f"{name} {i}"))) for i in range(60)]
    undrawn = []
    for key, place in keys_read(name).items():
        names = {key, alias.get(key, key)} | {mine for mine, theirs in alias.items() if theirs == key}
        values = {json.dumps([config.get(n) for n in sorted(names)]) for config in configs}
        config = dict.fromkeys(names - family.fixed.keys(), "stated")
        is_doubtful = unread_keys(config, {}, fixed={}, unused=family.unused, family=name).unknown == tuple(config)
        if len(values) < 2 and config and is_doubtful and key not in DERIVED and (name, key) not in UNDRAWN:
            undrawn.append(f"{key} ({place})")
    assert keys_read(name).keys() >= {"hidden_size"} or alias.get("hidden_size") in keys_read(name)
    assert undrawn == []
