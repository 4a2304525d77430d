"""Which layers have a window, and how wide it is."""

from __future__ import annotations

import pytest

from llmkit.architecture.layer_types import is_sliding, window_of
from llmkit.architecture.registry import default_registry
from llmkit.errors import SpecError

PLUGINS = {p.name: p for p in default_registry().plugins}


def windows(name, changes):
    architecture = default_registry().load(PLUGINS[name])
    model = architecture.bind({**architecture.tiny, **changes})
    return [block.attention.window for block in model.blocks]


def test_layer_types_win_over_the_rule():
    assert is_sliding({}, 3, lambda i: i == 3)
    assert not is_sliding({"layer_types": ["full_attention"] * 4}, 3, lambda i: i == 3)


@pytest.mark.parametrize(
    ("types", "found"),
    [(["full_attention"], r"\['full_attention'\]"), (["full_attention", "chunked_attention"], "'chunked_attention'")],
)
def test_layer_types_that_make_no_sense(types, found):
    with pytest.raises(
        SpecError, match=rf"layer_types\[1\] must be one of full_attention, sliding_attention, found {found}"
    ):
        is_sliding({"layer_types": types}, 1, lambda i: True)


@pytest.mark.parametrize("width", [0, -1, True, 4096.5, "4096"])
def test_a_width_that_is_none(width):
    with pytest.raises(SpecError, match=r"sliding_window is .*, expected a positive whole number or null"):
        window_of({"sliding_window": width}, None)


def test_null_is_no_window_and_absent_is_the_default():
    assert window_of({"sliding_window": None}, 4096) is None
    assert window_of({}, 4096) == 4096


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("mistral", {}, [7, 7]),
        ("mistral", {"sliding_window": None}, [None, None]),
        ("qwen2", {}, [None, None]),
        ("qwen2", {"use_sliding_window": True}, [None, 7]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, [7, 7]),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, [None, None]),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, [7, None]),
    ],
)
def test_windows_of_released_configs(name, changes, wanted):
    assert windows(name, changes) == wanted
