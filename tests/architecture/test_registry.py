"""Plugins are found by config, loaded when needed, and kept apart when they fail or clash."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmkit.architecture.registry import Plugin, Registry, default_registry, find, model_type_of, require
from llmkit.errors import PluginError, RequirementError

ROOT = Path(__file__).resolve().parents[2]
BUILTIN = next(p for p in default_registry().plugins if p.name == "llama")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module of a third-party distribution with the given text."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, text, origin="other 1.0"):
        module = f"third_party_{name}"
        (tmp_path / f"{module}.py").write_text(text)
        return Plugin(name, f"{module}:ARCHITECTURE", origin)

    return make


CLONE = (
    "from dataclasses import replace\nfrom llmkit_plugins.llama import ARCHITECTURE as A\n"
    "ARCHITECTURE = replace(A, name='clone', matches=({match!r},), model_types=('clone',))\n"
)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"architectures": ["LLaMAForCausalLM"]},
        {"model_type": "llama"},
        {"architectures": [], "model_type": "LLaMA"},
        {"architectures": None, "model_type": "llama"},
    ],
)
def test_found_by_architecture_or_model_type(config):
    assert find(config).name == "llama"


@pytest.mark.parametrize(
    "config",
    [{}, {"model_type": "unheard"}, {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}],
)
def test_not_found(config):
    assert find(config) is None
    with pytest.raises(RequirementError, match="my-model: no plugin describes its architecture") as caught:
        require(config, "my-model")
    assert "llmkit plugins list" in caught.value.hint


def test_a_clash_names_both(plugin):
    registry = Registry([BUILTIN, plugin("mine", CLONE.format(match="LLAMAForCausalLM"))])
    with pytest.raises(PluginError, match=r"two plugins claim LlamaForCausalLM: llama \(.*\) and mine \(other 1.0\)"):
        registry.find({"architectures": ["LlamaForCausalLM"]})
    assert registry.find({"model_type": "clone"}).name == "clone"
    (clash,) = registry.clashes()
    assert "LLAMAForCausalLM is claimed by llama" in clash
    assert "mine (other 1.0)" in clash


def test_a_failing_plugin_is_kept_with_its_error(plugin):
    broken = plugin("broken", "raise OSError('no such thing')")
    registry = Registry([broken, BUILTIN])
    assert registry.find({"architectures": ["LlamaForCausalLM"]}).name == "llama"
    error = registry.load_all()[broken]
    assert isinstance(error, PluginError)
    assert "plugin broken (other 1.0) cannot be loaded: OSError: no such thing" in error.message
    with pytest.raises(PluginError, match="plugin broken"):
        registry.find({"model_type": "broken"})
    wrong = plugin("wrong", "ARCHITECTURE = 7")
    with pytest.raises(PluginError, match="is a int, expected an Architecture"):
        Registry([wrong]).load(wrong)


def test_builtin_plugins_are_loaded_only_when_needed(plugin):
    other = replace(plugin("loaded_too_early", "raise OSError"), is_builtin=True)
    registry = Registry([other, BUILTIN])
    assert registry.find({"architectures": ["LlamaForCausalLM"]}).name == "llama"
    assert list(registry._loaded) == [BUILTIN]


def test_from_a_checkout_that_is_not_installed(tmp_path):
    """Only the package folder on the path, as in `python -m llmkit` from a clone; and torch is not imported."""
    code = (
        "import sys; from llmkit.architecture.registry import find\n"
        "print(find({'model_type': 'llama'}).bind(find({'model_type': 'llama'}).tiny_config()).dims.hidden)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == "32\n"


@pytest.mark.parametrize("value", [["llama"], {"llama": 1}, 7, None])
def test_a_model_type_of_another_type_is_none(value):
    assert model_type_of({"model_type": value}) == ""
    assert find({"architectures": [value], "model_type": value}) is None
