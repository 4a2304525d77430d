"""Are these weights, or differences of weights? A published delta has the names and shapes of a model.

The scales of norms tell: trained ones are positive, nearly all, and between 0.05 and some units; differences are
of both signs, or zero, and a hundred times smaller. A few kilobytes of them are read, without torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import LlmkitError
from llmkit.tensors.lazy import Lazy, Read
from llmkit.tensors.spec import DType

_VECTORS, _VALUES, _ENOUGH = 64, 256, 64
_MOST_POSITIVE, _LARGEST_RMS = 0.8, 0.1
_CODES = {DType.F16: "e", DType.F32: "f"}


def looks_like_differences(ckpt: Checkpoint) -> bool:
    """Whether the norm weights of a model that a plugin describes are those of a delta; False where that is unknown."""
    try:
        model = ckpt.model
        if model is None or getattr(model.final_norm, "offset", 0.0) != 0:  # weights less 1 are small in models, too
            return False
        names = [n for n, slot in model.tensors().items() if slot.kind == "norm" and n in ckpt.tensors]
    except LlmkitError:
        return False
    values = [x for name in names[:: max(len(names) // _VECTORS, 1)] for x in _first(ckpt.tensors[name])]
    if len(values) < _ENOUGH:
        return False
    n_positive = sum(x > 0 for x in values)
    rms = (sum(x * x for x in values) / len(values)) ** 0.5
    return n_positive < _MOST_POSITIVE * len(values) and rms < _LARGEST_RMS


def _first(lazy: Lazy) -> Iterator[float]:
    """The first values of a vector that lies in a file as it is."""
    node, code = lazy.node, _CODES.get(lazy.dtype)
    if not isinstance(node, Read) or node.strides is not None or (code is None and lazy.dtype is not DType.BF16):
        return
    n = min(lazy.spec.numel, _VALUES)
    data = node.source.read(node.offset, n * lazy.dtype.itemsize)
    if code is not None:
        yield from (x for (x,) in struct.iter_unpack(f"<{code}", data))
    else:  # the upper half of a float32
        wide = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
        yield from (x for (x,) in struct.iter_unpack("<f", wide))
