"""Export by Optimum, for models that no plugin describes: transformers' model, traced. Its environment is its own."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.manifest import new_manifest
from llmkit.decoder.foreign import load_transformers
from llmkit.errors import InputError, LlmkitError, RequirementError
from llmkit.lazy_imports import torch
from llmkit.onnx.opening import load_onnx
from llmkit.onnx.parity import Difference, compare_decoders
from llmkit.pipeline.commit import Partial
from llmkit.pipeline.hashing import hash_range
from llmkit.pipeline.steps import Work, write_output
from llmkit.pipeline.target import Target
from llmkit.tensors.source import SourceFile

VIA = ("optimum",)
_TASK = "text-generation-with-past"


def export_by_optimum(ckpt: Checkpoint, target: Target) -> dict[str, Any]:
    """Trace a model into an ONNX folder; the manifest. The whole model is in memory meanwhile.

    Raises:
        RequirementError: Optimum is not installed, or does not know the architecture.
        InputError: not a folder in transformers' layout.
        OutputError: the output cannot be written there.
    """
    source = ckpt.origin
    if source is None or not source.is_dir() or ckpt.layout != "hf":
        raise InputError(
            f"Optimum reads folders in transformers' layout, and {ckpt.label} is none",
            hint=f"llmkit convert {ckpt.label} --to hf -o OUT",
        )
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise RequirementError(
            "Optimum's exporter is not installed",
            hint="pip install 'llmkit[cpu,optimum]' in an environment of its own: it needs an older transformers",
        ) from error
    sources = {id(r.source): r.source for lazy in ckpt.tensors.values() for r in lazy.reads()}
    target = replace(target, inputs=(*target.inputs, source, *(s.path for s in sources.values())))
    step = {"transform": "export", "to": "onnx", "via": "optimum", "optimum": version("optimum-onnx")}
    digest = hashlib.sha256(json.dumps([step, [s.fingerprint() for s in sources.values()]]).encode()).hexdigest()

    def write(partial: Partial) -> dict[str, Any]:
        partial.clear()  # the exporter cannot go on where it stopped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of each branch that it takes
            try:
                # Its own validation is left out: the check against transformers comes after.
                main_export(str(source), str(partial.path), task=_TASK, local_files_only=True, do_validation=False)
            except LlmkitError:
                raise
            except Exception as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise RequirementError(f"Optimum cannot export {ckpt.label}: {first}") from error
        for name, content in ckpt.tokenizer_files.items():
            if not (partial.path / name).exists():
                partial.write_file(name, content.read())
        written = [SourceFile(p) for p in sorted(partial.path.iterdir()) if not p.name.startswith(".")]
        return new_manifest(
            recipe=[*ckpt.history, step],
            files={s.path.name: {"nbytes": s.nbytes, "xxh3": hash_range(s, 0, s.nbytes)} for s in written},
            tools={name: version(name) for name in ("optimum-onnx", "transformers")},
        )

    return write_output(Work(digest, 2 * ckpt.nbytes, sources.values()), target, write, label="exporting")


def compare_with_transformers(ckpt: Checkpoint, folder: Path) -> list[Difference]:
    """Logits of the folder against those of transformers' model: prefill, cached steps, padding on the left."""
    exported = load_onnx(folder)
    wanted = load_transformers(ckpt, torch.float32, torch.device("cpu"))
    return compare_decoders(exported, wanted, n_vocab=exported.n_vocab)
