"""From module paths of the model that was trained to tensor names of the base."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.embeddings import Embeddings
from llmkit.checkpoint.spelling import spellings
from llmkit.errors import SpecError, nearest

OTHER_BASE = "merge it into the model that it was trained on: base_model_name_or_path of its adapter_config.json"

# Heads of classes other than the causal one: transformers', and TRL's value head.
_TASK_HEADS = ("score", "classifier", "qa_outputs", "classification_head", "reward_head", "value_head", "v_head")


class Paths:
    """Finds the tensors of a module. Base and trained model may differ by leading components (`model.`).

    Attributes:
        note: what was stripped or added to make the names agree; None when they agree as they are.
    """

    def __init__(self, ckpt: Checkpoint, embeddings: Embeddings, modules: Sequence[str]) -> None:
        self._label = ckpt.label
        self._modules = dict.fromkeys(name.rpartition(".")[0] for name in ckpt.tensors)
        self._has_parts = "text_config" in ckpt.config
        self._head = embeddings.head.rpartition(".")[0] if embeddings.head else None
        renamed = ckpt.architecture.names.in_memory if ckpt.architecture is not None else {}
        self._in_files = {loaded: stored for stored, loaded in renamed.items()}
        wanted = [] if self._has_parts else [m for m in modules if m not in self._modules and not self._is_head(m)]
        self._change = (0, "")
        if wanted:
            wanted = [m for m in modules if not self._is_head(m)]
            candidates = [(0, ""), *((n, "") for n in (1, 2)), *((0, p) for p in self._prefixes())]
            hits = [(sum(self._rename(m, c) in self._modules for m in wanted), -i) for i, c in enumerate(candidates)]
            self._change = candidates[-max(hits, default=(0, 0))[1]]
        self.note = self._describe(wanted)

    def _is_head(self, module: str) -> bool:
        module = self._in_files.get(module, module)
        last = module.rpartition(".")[2]
        return self._head is not None and (last == self._head.rpartition(".")[2] or module == self._head)

    def _prefixes(self) -> list[str]:
        prefixes: dict[str, None] = {}
        for module in self._modules:
            words = module.split(".")
            prefixes.setdefault(words[0] + ".")
            prefixes.setdefault(".".join(words[:2]) + ".")
        return list(prefixes)

    @staticmethod
    def _rename(module: str, change: tuple[int, str]) -> str:
        n, prefix = change
        return prefix + ".".join(module.split(".")[n:])

    def _describe(self, wanted: list[str]) -> str | None:
        n, prefix = self._change
        if not wanted or (n, prefix) == (0, ""):
            return None
        what = f"{prefix!r} put before" if prefix else f"{'.'.join(wanted[0].split('.')[:n]) + '.'!r} taken from"
        return f"module names: {what} the adapter's, to agree with {self._label}"

    def module(self, path: str) -> str:
        """The module of the base that a path means; the path itself when there is none (see `missing`)."""
        if path in self._modules:
            return path
        if self._is_head(path) and self._head is not None:
            return self._head
        for loaded, stored in self._in_files.items():
            if path.endswith(f".{loaded}") and (other := path.removesuffix(loaded) + stored) in self._modules:
                return other
        if self._has_parts:
            return next((other for other in spellings(path) if other in self._modules), path)
        return self._rename(path, self._change)

    @property
    def modules(self) -> Sequence[str]:
        """The modules of the base."""
        return list(self._modules)

    def named(self, end: str) -> list[str]:
        """The modules of the base that an entry of `modules_to_save` means: PEFT compares ends of names."""
        stored = self._in_files.get(end, end)
        return [module for module in self._modules if module.endswith((end, stored))]

    def missing(self, label: str, path: str, what: str) -> SpecError:
        """The error for a module that the base does not have."""
        leaf = path.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if leaf in _TASK_HEADS or path.startswith("v_head"):
            return SpecError(
                f"{label}: {what} of {path} is the head of a classifier or reward model, which {self._label} does not "
                "have: it is a language model",
                hint="save the base with the class that was trained (AutoModelForSequenceClassification with its "
                "num_labels, task_type SEQ_CLS) and merge into that",
            )
        guess = self._nearest_module(path)
        layers = [m for m in self._modules if any(part.isdigit() for part in m.split("."))]
        nearest_text = (
            f"the nearest module is {guess}; " if guess else f"its modules are such as {layers[-1]}; " if layers else ""
        )
        return SpecError(
            f"{label}: {what} of {path} has no place in {self._label}, which has no such tensor",
            hint=nearest_text + OTHER_BASE,
        )

    def _nearest_module(self, path: str) -> str | None:
        """The module most like a path: one whose last component is the same or nearly so, since all else repeats."""
        leaf = path.rpartition(".")[2]
        leaves = dict.fromkeys(m.rpartition(".")[2] for m in self._modules)
        close = leaf if leaf in leaves else next(iter(get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)), None)
        return nearest(path, [m for m in self._modules if m.rpartition(".")[2] == close]) if close else None
