"""Is this, tensor for tensor, the base that llmkit made the delta from? Compared by hashes in the delta's manifest."""

from __future__ import annotations

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import listing
from llmkit.lazy_imports import torch
from llmkit.tensors.lazy import Lazy, Read
from llmkit.transforms.delta.base_structure import Finding
from llmkit.transforms.delta.marker import Marker, recorded_hashes

# Hash no more than this; small tensors first, as tuning changes every norm weight and any other base has others.
SAMPLE_NBYTES = 50_000_000


def identity_findings(base: Checkpoint, delta: Checkpoint) -> list[Finding]:
    """Compare small tensors of `base`, and some large ones, with the recorded hashes."""
    from xxhash import xxh3_128

    recorded = recorded_hashes(delta)
    label = Marker.of(delta).base_label
    wanted = [(base.tensors[n], n) for n in recorded if n in base.tensors and isinstance(base.tensors[n].node, Read)]
    chosen: list[tuple[Lazy, str]] = []
    budget = SAMPLE_NBYTES
    for lazy, name in sorted(wanted, key=lambda pair: pair[0].spec.nbytes):
        if lazy.spec.nbytes > budget:
            break
        budget -= lazy.spec.nbytes
        chosen.append((lazy, name))
    if not chosen:
        message = f"{delta.label} records no hashes of its base: only names and shapes were compared with {base.label}"
        return [Finding("note", "unrecorded", message)]
    differing = []
    for lazy, name in chosen:
        data = lazy.load().contiguous().reshape(-1).view(torch.uint8).numpy()
        if xxh3_128(data.tobytes()).hexdigest() != recorded[name]:
            differing.append(name)
    if not differing:
        message = f"base check: {len(chosen)} tensors of {base.label} have the hashes of the base ({label})"
        return [Finding("note", "identical", message, None, 0.0, 0.0)]
    message = (
        f"{base.label} is not the base that {delta.label} was made from ({label}): "
        f"{len(differing)} of {len(chosen)} compared tensors have other contents: {listing(differing)}"
    )
    hint = "give the base the delta was made from, unchanged"
    return [Finding("refuse", "contents", message, hint, len(differing) / len(chosen), 0.0)]
