"""Which model and which software a run record speaks of."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.quantization.codec import config_entry

PACKAGES = ("lm-eval", "datasets", "transformers", "tokenizers", "torch", "numpy")
"""What takes part in a score."""


def describe_model(ckpt: Checkpoint) -> dict[str, Any]:
    """Label, path and digests of a checkpoint.

    `header_digest` covers names, dtypes and shapes of all tensors and the config: equal for two models of one layout.
    `source_digest` covers the expressions and the files that they read by size and time, not by content.
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
        "nbytes": ckpt.nbytes,
        "header_digest": digest_of([headers, dict(ckpt.config)]),
        "source_digest": digest_of(ckpt.fingerprints()),
        "tokenizer_digest": digest_of(tokenizer),
        "history": [dict(step) for step in ckpt.history],
    }


def digest_of(body: Any) -> str:
    """Identifies plain data."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()
