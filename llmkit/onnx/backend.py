"""The backend that computes a model: llmkit's decoder, transformers, or, for an exported folder, ONNX Runtime."""

from __future__ import annotations

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.decoder import load as decoders
from llmkit.decoder.language_model import LanguageModel
from llmkit.errors import InputError, require_choice
from llmkit.layouts.onnx_folder import NAME
from llmkit.onnx.opening import load_onnx

BACKENDS = (*decoders.BACKENDS, NAME)


def load_backend(
    ckpt: Checkpoint, *, backend: str = "auto", dtype: str = "float32", device: str = "cpu", provider: str | None = None
) -> LanguageModel:
    """A model to score and generate with.

    Args:
        ckpt: the checkpoint, or an exported folder opened as one.
        backend: as for `llmkit.decoder.load_backend`; `auto` is ONNX Runtime for an exported folder.
        dtype: of the torch decoders; a graph has its own.
        device: of the torch decoders.
        provider: of ONNX Runtime: cpu or cuda.

    Raises:
        InputError: no such backend, or options that the backend does not have.
        RequirementError: the backend does not know the architecture, or is not installed.
    """
    require_choice("--backend", backend, BACKENDS)
    folder = ckpt.origin if ckpt.layout == NAME else None
    if backend == NAME and folder is None:
        raise InputError(
            f"{ckpt.label} is no folder for ONNX Runtime", hint=f"llmkit export {ckpt.label} --to onnx -o OUT makes one"
        )
    if folder is None or backend not in ("auto", NAME):
        if provider is not None:
            raise InputError(
                f"--provider is ONNX Runtime's, and {ckpt.label} is computed by torch", hint="--device cpu or cuda"
            )
        return decoders.load_backend(ckpt, backend=backend, dtype=dtype, device=device)
    for option, value, default in (("--dtype", dtype, "float32"), ("--device", device, "cpu")):
        if value not in (default, "auto"):
            hint = "llmkit export --dtype chooses it" if option == "--dtype" else f"--provider {value}"
            raise InputError(f"{option} {value} is torch's, and {ckpt.label} is computed by ONNX Runtime", hint=hint)
    return load_onnx(folder, provider=provider or "cpu")
