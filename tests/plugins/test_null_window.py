"""A config whose window is null, which the contract's tiny configs cannot say: every layer sees all, with positions."""

from __future__ import annotations

from reliability.against_transformers import PLUGINS, quietly, their_model, try_ours


def test_layers_without_any_window_have_positions(tmp_path):
    config = PLUGINS["exaone4"].tiny_config()
    config |= {"sliding_window": None, "layer_types": ["full_attention"] * config["num_hidden_layers"]}
    with quietly():
        outcome = try_ours(their_model(config), config, tmp_path)
    assert outcome.is_equal, outcome
