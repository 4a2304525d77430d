"""What the config of an adapter says was trained, and its file does not hold: whole modules, and layers among others.

PEFT ends with a KeyError where a whole module is missing, and warns of missing keys where an update is.
Source: huggingface/peft, src/peft/utils/save_and_load.py and src/peft/tuners/tuners_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from llmkit.checkpoint.embeddings import Embeddings
from llmkit.errors import RequirementError, counted, listing
from llmkit.formats.adapter import Adapter
from llmkit.formats.adapter_config import is_among, saved_modules
from llmkit.formats.adapter_files import CONFIG_NAME
from llmkit.transforms.lora.names import Paths

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def missing_parts(
    adapter: Adapter, paths: Paths, embeddings: Embeddings, layers: Container[str], *, force: bool
) -> list[str]:
    """Warnings about what is not there.

    Args:
        layers: modules of the base that its class has, where that is known; all otherwise.

    Raises:
        RequirementError: a module that was trained whole is missing; with `force` that is a warning too.
    """
    warnings = []
    if unsaved := _unsaved(adapter, paths, embeddings):
        text = (
            f"{adapter.label}: modules_to_save of its {CONFIG_NAME} names {listing(unsaved)}, and its file holds "
            f"no tensor of {'it' if len(unsaved) == 1 else 'them'}: what was trained there is lost"
        )
        if not force:
            raise RequirementError(
                text,
                hint="save it again from the trained model (model.save_pretrained), or take a checkpoint of the run; "
                "--force merges what is there and keeps the base's",
            )
        warnings.append(f"forced: {text}")
    if without := list(_without_update(adapter, paths, layers)):
        warnings.append(
            f"{adapter.label} has no update for {counted(len(without), 'module')} that target_modules of its "
            f"{CONFIG_NAME} names: {listing(without, 3)}; they stay the base's, as in peft, which is right only if the "
            "file is whole"
        )
    return warnings


def _unsaved(adapter: Adapter, paths: Paths, embeddings: Embeddings) -> list[str]:
    """Names of modules_to_save that mean modules of the base of which the adapter has nothing."""
    held = [*(name.rpartition(".")[0] for name in adapter.replacements), *adapter.modules, *adapter.tokens]
    ends = [name.rpartition(".")[0] for name in (embeddings.embed, embeddings.head) if name is not None]
    has_end = embeddings.is_tied and any(paths.module(module) in ends for module in held)
    found = []
    for name in saved_modules(adapter.config):
        meant = [module for module in paths.named(name) if not (has_end and module in ends)]
        if meant and not any(module.endswith(name) for module in held):
            found.append(name)
    return found


def _without_update(adapter: Adapter, paths: Paths, layers: Container[str]) -> Iterator[str]:
    """Modules like those that are updated, but of other layers, which the config targets all the same."""
    config = adapter.config
    targets = config.get("target_modules")
    is_chosen = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if not isinstance(targets, list) or is_chosen or adapter.kind == "ADALORA":  # which prunes updates to nothing
        return
    at = {paths.module(module): module for module in adapter.modules}
    forms = {_NUMBER.sub("#", module): path for module, path in at.items()}
    for module in paths.modules:
        path = forms.get(_NUMBER.sub("#", module))
        if path is None or module in at or module not in layers:
            continue
        first, *others = _NUMBER.split(path)
        path = first + "".join(map("".join, zip(_NUMBER.findall(module), others, strict=False)))
        if is_among(targets, path):
            yield module
