"""Which layout is it? Told from file names, first bytes and tensor names; no tensor data is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmkit.layouts import consolidated, easylm, gguf, lit, litgpt, llama2c, meta, onnx_folder, originals, tencent
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.layout import Opened

__all__ = ["open_foreign"]

# Each looks at a candidate and says None, or what it holds. Those with a format of their own come first: the others
# look at `candidate.tensors`, which fails for what is neither safetensors nor a torch file.
_FINDERS: Sequence[Callable[[Candidate], Opened | None]] = (
    onnx_folder.find, gguf.find, llama2c.find, easylm.find, meta.find, consolidated.find, lit.find, litgpt.find,
    tencent.find, originals.find,
)  # fmt: skip


def open_foreign(candidate: Candidate) -> Opened | None:
    """What a layout other than transformers' own holds; None where no layout claims the path.

    Raises:
        InputError: a layout is recognised and its files are damaged, incomplete or contradict one another.
    """
    return next((opened for find in _FINDERS if (opened := find(candidate)) is not None), None)
