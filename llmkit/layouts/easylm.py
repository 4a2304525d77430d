"""EasyLM's streaming checkpoints, the layout of Koala's weight differences: matrices transposed, pairs interleaved.

Source: young-geng/EasyLM (models/llama/convert_easylm_to_hf.py, scripts/diff_checkpoint.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from llmkit.architecture.names import Names, Transposed
from llmkit.errors import InputError, listing
from llmkit.formats import msgpack_stream
from llmkit.formats.folder import is_weight_file
from llmkit.formats.unreadable import read_head
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.described import opened_by_names
from llmkit.layouts.layout import Layout, OpenedLayout, Spelling
from llmkit.tensors.lazy import Lazy
from llmkit.tensors.rearrange import transpose

NAME = "easylm"
_SLOTS = {
    "attn.q": "attention.wq", "attn.k": "attention.wk", "attn.v": "attention.wv", "attn.o": "attention.wo",
    "mlp.gate": "feed_forward.w1", "mlp.down": "feed_forward.w2", "mlp.up": "feed_forward.w3",
}  # fmt: skip
SPELLING = Spelling(
    Names(
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        block="transformer.h.{i}.",
        slots={slot: Transposed(name) for slot, name in _SLOTS.items()}
        | {"attn_norm": "attention_norm", "mlp_norm": "ffn_norm"},
    ),
    "interleaved",
)


def find(candidate: Candidate) -> OpenedLayout | None:
    """What a streaming checkpoint of EasyLM holds; None for anything else.

    Raises:
        InputError: truncated or malformed, or the tensors are not those of one model.
    """
    path = _stream(candidate)
    if path is None:
        return None
    return opened_by_names(NAME, candidate, path, _named(str(path), msgpack_stream.read(path)), SPELLING)


def _stream(candidate: Candidate) -> Path | None:
    """The file that is a stream; in a folder without other weights the only one, whatever its name."""
    if candidate.main is not None:
        return candidate.main if msgpack_stream.looks_like(candidate.head) else None
    if any(is_weight_file(name) for name in candidate.names):
        return None
    streams = []
    for name in candidate.names:
        if not name.endswith((".json", ".txt", ".md", ".model", ".jinja")):
            streams += [name] if msgpack_stream.looks_like(read_head(candidate.folder / name)) else []
    if len(streams) > 1:
        raise InputError(
            f"{candidate.folder} holds {len(streams)} streams of EasyLM: {listing(streams)}",
            hint="name the one to read",
        )
    return candidate.folder / streams[0] if streams else None


def _named(where: str, stored: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """`params.params.lm_head.kernel` -> `lm_head.weight`; parameters only, of what may be a whole train state."""
    is_state = any(re.match(r"(params\.)+transformer\.", name) for name in stored)
    renamed: dict[str, Lazy] = {}
    for name, lazy in stored.items():
        if is_state and not name.startswith("params."):
            continue  # the optimizer's state, the step
        plain = re.sub(r"^(params\.)+", "", name)
        stem, _, leaf = plain.rpartition(".")
        renamed[f"{stem}.weight" if leaf in ("kernel", "embedding") else plain] = lazy
    if "transformer.wte.weight" not in renamed:
        raise InputError(
            f"{where}: a msgpack stream without transformer.wte.embedding: not EasyLM's layout of a decoder",
            hint="give a file that EasyLM's convert_torch_to_easylm or diff_checkpoint wrote",
        )
    if "lm_head.weight" in renamed:
        renamed["lm_head.weight"] = transpose(renamed["lm_head.weight"])
    return renamed


LAYOUT = Layout(NAME, find, spellings=(SPELLING,), has_own_format=True)
