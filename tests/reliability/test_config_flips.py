"""No key of a config changes what transformers computes without llmkit computing it, refusing it, or naming it.

One value of each key; all of them, some minutes, are a command: python tests/reliability/config_flips.py
"""

from __future__ import annotations

import pytest
import transformers

from llmkit.errors import SpecError
from reliability.against_transformers import PLUGINS, try_ours
from reliability.config_flips import FAMILIES, check_family

# Refused although transformers computes the same: its class does not look at what the config says.
DOUBTFUL = {("gpt_neox", "rope_theta"), ("gpt_neox", "partial_rotary_factor"), ("gpt_neo", "is_causal")}
DOUBTFUL |= {("deepseek2", "norm_topk_prob"), ("phimoe", "num_experts_per_tok")}  # the originals' classes look at them
DOUBTFUL |= {("phimoe", "rope_scaling.long_mscale")}  # which is of texts longer than the ones computed here
DOUBTFUL |= {("ernie4_5_moe", "moe_norm_min")}  # a floor that the sums computed here are above of
DOUBTFUL |= {("solar_open", "partial_rotary_factor")}  # 1.05 of a head's dims are all of them
# What the original computes with (see its recordings) and transformers' class does not look at.
OF_THE_ORIGINAL = {("mpt", key) for key in ("expansion_ratio", "logit_scale", "no_bias", "norm_type")}
# transformers 5 gives it to the layers without a window only, transformers 4 and the original to all.
OF_THE_ORIGINAL |= {("olmo3", "rope_theta")}
# The originals rotate qk_rope_head_dim dims; with another head_dim transformers fails, or all have one frequency.
OF_THE_ORIGINAL |= {("deepseek3", "head_dim"), ("youtu", "head_dim")}
if transformers.__version__.startswith("4."):  # what transformers 5 writes, and 4 does not look at
    OF_THE_ORIGINAL |= {
        (name, key)
        for name in FAMILIES
        for key in ("rope_parameters", "rope_scaling.rope_theta", "rope_scaling.partial_rotary_factor")
    }
ODD = "rotary positions would turn"  # an odd number of dims
NO_NUMBER = "is True, expected a finite number"


def is_right(name, flip):
    if (name, flip.path) in OF_THE_ORIGINAL:
        return True
    if flip.verdict == "refused needlessly":
        return (name, flip.path) in DOUBTFUL or any(said in flip.outcome.refusal for said in (ODD, NO_NUMBER))
    return flip.verdict != "WRONG"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_a_family(name):
    flips = list(check_family(name, short=True))
    assert [f for f in flips if not is_right(name, f)] == []
    assert sum(f.changes for f in flips) >= 6, "too few keys that matter: the check itself is broken"


def bound(name, config):
    """All that is computed with a config; None where it is refused."""
    try:
        model = PLUGINS[name].bind(config)
    except SpecError:
        return None
    return model.embedding, model.blocks, model.final_norm, model.head


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "falcon_h1"])  # which has multipliers of one
def test_what_a_config_leaves_out_is_as_the_class_has_it(name):
    """A default that is written out changes nothing."""
    compared = 0
    for variant in (None, *PLUGINS[name].variants):
        config = PLUGINS[name].tiny_config(variant)
        for key in config.keys() - {"architectures", "model_type", "num_hidden_layers", "layer_types"}:
            rest = {k: v for k, v in config.items() if k != key}
            try:
                made = transformers.AutoConfig.for_model(**rest)
            except Exception:  # noqa: BLE001 - transformers' own refusal, in whatever form
                continue
            values, alias = made.to_dict(), type(made).attribute_map
            rope = values.get("rope_parameters") or {}
            nested = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}.get(key, key)
            stated = rope.get(nested, rope.get("full_attention", {}).get(nested, values.get(alias.get(key, key))))
            found, wanted = bound(name, rest), bound(name, rest | {key: stated})
            if stated is not None and None not in (found, wanted):
                compared += 1
                assert found == wanted, (variant, key, stated)
    assert compared >= 3


def test_a_key_that_is_not_read_is_found(monkeypatch):
    """The check finds an ignored key: here llmkit does not get to see it."""

    def blind(theirs, config, folder):
        return try_ours(theirs, {k: v for k, v in config.items() if k != "is_causal"}, folder)

    monkeypatch.setattr("reliability.config_flips.try_ours", blind)
    monkeypatch.setattr("reliability.config_flips.flips_of", lambda config, **_: iter([("is_causal", False)]))
    found = next(f for f in check_family("llama") if f.path)
    assert (found.verdict, found.changes) == ("WRONG", True)
