"""State space models in GGUF files: names of their tensors, and their sizes in metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.architecture.gguf import DECAY, Form, Metadata
from llmkit.architecture.model import Model

SCAN = {
    "in": "ssm_in", "conv": "ssm_conv1d", "x": "ssm_x", "dt": "ssm_dt", "a_log": "ssm_a", "d": "ssm_d",
    "out": "ssm_out", "dt_norm": "ssm_dt_norm", "b_norm": "ssm_b_norm", "c_norm": "ssm_c_norm",
}  # fmt: skip
DUALITY = {
    "in": "ssm_in", "conv": "ssm_conv1d", "dt_bias": "ssm_dt.bias", "a_log": "ssm_a", "d": "ssm_d",
    "norm": "ssm_norm", "out": "ssm_out",
}  # fmt: skip
SCAN_FORMS: Mapping[str, Form] = {"attn.a_log": DECAY}
# Keys that files of models without attention have for nothing, or with values that nothing stands behind.
WITHOUT_ATTENTION = {
    "context_length": 2**20,
    "feed_forward_length": 0,
    "attention.head_count": 0,
    "attention.head_count_kv": None,
}


def under(stem: str, names: Mapping[str, str]) -> dict[str, str]:
    """The names by slots below `stem`."""
    return {f"{stem}.{slot}": name for slot, name in names.items()}


def duality_forms(stem: str) -> dict[str, Form]:
    """How files have the weights of Mamba 2 below `stem`: a row for each head, a norm for each group."""
    return {
        f"{stem}.a_log": Form(("ssm_heads", "1"), value="-exp"),
        f"{stem}.d": Form(("ssm_heads", "1")),
        f"{stem}.norm.weight": Form(("ssm_groups", "")),
    }


def sizes(model: Model) -> dict[str, Any]:
    """The metadata of both: Mamba's rank of steps, Mamba 2's heads and groups under the same keys."""
    extra = model.dims.extra
    has_heads = "ssm_heads" in extra
    return {
        "ssm.conv_kernel": extra["kernel"],
        "ssm.inner_size": extra["inner"],
        "ssm.state_size": extra["state"],
        "ssm.time_step_rank": extra["ssm_heads" if has_heads else "dt_rank"],
        "ssm.group_count": extra["ssm_groups"] if has_heads else None,
    }


def expansion(metadata: Metadata) -> Any:
    """How many times wider than the stream the recurrence is."""
    times = metadata["ssm.inner_size"] / metadata["embedding_length"]
    return int(times) if times == int(times) else times


def needs_twice(model: Model) -> str | None:
    """Why llama.cpp cannot run a Mamba that is not twice as wide as the stream."""
    inner, hidden = model.dims.extra["inner"], model.dims.hidden
    return None if inner == 2 * hidden else f"its layers are {inner} wide, and not twice the {hidden} of the stream"
