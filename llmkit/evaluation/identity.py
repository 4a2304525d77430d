"""The model and the software of a run record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.manifest import versions
from llmkit.lazy_imports import torch
from llmkit.pipeline.hashing import hash_range
from llmkit.pipeline.pool import default_workers
from llmkit.pipeline.progress import NO_PROGRESS, Progress
from llmkit.quantization.codec import config_entry
from llmkit.tensors.lazy import Node, Read

PACKAGES = ("lm-eval", "datasets", "transformers", "tokenizers", "torch", "numpy")
"""What takes part in a score."""


def describe_model(ckpt: Checkpoint, progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    """Label, path and digests of a checkpoint; reads all of its files.

    `header_digest` covers names, dtypes and shapes of all tensors and the config: equal for two models of one layout.
    `source_digest` covers the expressions and the files that they read by path, size and time, not by content.
    `content_digest` covers the expressions and the bytes that they read, wherever the files lie: equal for a copy.
    `tokenizer_digest` covers the contents of the tokenizer's files.
    """
    headers = [[name, str(lazy.spec)] for name, lazy in ckpt.tensors.items()]
    tokenizer = [[name, hashlib.sha256(f.read()).hexdigest()] for name, f in sorted(ckpt.tokenizer_files.items())]
    stated = ckpt.config.get("architectures")
    return {
        "label": ckpt.label,
        "path": str(ckpt.origin.resolve()) if ckpt.origin is not None else None,
        "architectures": stated if isinstance(stated, list) else [],
        "quantization": (config_entry(ckpt.config) or {}).get("quant_method"),
        "nbytes": ckpt.nbytes if ckpt.tensors else None,
        "header_digest": digest_of([headers, dict(ckpt.config)]),
        "source_digest": digest_of(ckpt.fingerprints()),
        "content_digest": _content_digest(ckpt, progress),
        "tokenizer_digest": digest_of(tokenizer),
        "history": [dict(step) for step in ckpt.history],
    }


def _content_digest(ckpt: Checkpoint, progress: Progress) -> str:
    reads = list({id(r): r for lazy in ckpt.tensors.values() for r in lazy.reads()}.values())

    def hashed(read: Read) -> str:
        return hash_range(read.source, read.offset, read.span_nbytes, progress=progress, note=read.name)

    progress.begin(sum(r.span_nbytes for r in reads), "hashing the model")
    try:
        with ThreadPoolExecutor(default_workers()) as pool:
            contents: dict[Node, str] = dict(zip(reads, pool.map(hashed, reads), strict=True))
    finally:
        progress.end()
    return digest_of([[n, lazy.node.content_fingerprint(contents), lazy.index] for n, lazy in ckpt.tensors.items()])


def answers_key(model: Mapping[str, Any], settings: Mapping[str, Any], computed: Mapping[str, Any]) -> str:
    """Identifies the runs that may go on from each other's answers: the same model, settings, software and kernels.

    Where files lie does not count. The prompts are not in it: answers are kept under their token ids.

    Args:
        model: of `describe_model`.
        settings: of the record.
        computed: dtype, device and backend, and what the engine says of itself.
    """
    contents = {k: model[k] for k in ("content_digest", "header_digest", "tokenizer_digest")}
    shaping = {k: v for k, v in settings.items() if k not in ("data", "include_path")}
    return digest_of([contents, shaping, dict(computed), versions(*PACKAGES), kernel_of(str(computed["device"]))])


def kernel_of(device: str) -> str:
    """What torch computes with on a device: the widest vectors of the CPU, or the name of the GPU."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return str(torch.backends.cpu.get_cpu_capability())


def digest_of(body: Any) -> str:
    """Identifies plain data."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()
