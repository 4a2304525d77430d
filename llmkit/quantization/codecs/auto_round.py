"""AutoRound's own folders: tensors of GPTQ, AWQ, or compressed-tensors' float4, told apart by `packing_format`.

    auto_round:auto_gptq         as GPTQ's first version: zero points minus 1
    auto_round                   the same with zero points as they are, as GPTQ's second version
    auto_round:auto_awq          AWQ, GEMM
    auto_round:llm_compressor    MXFP4 or NVFP4 (`data_type`)
    auto_round:fp8_static        float8

Which matrices have other bits (`extra_config`) their shapes tell. Source: auto_round/inference/backend.py and
export/export_to_autoround of intel/auto-round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.errors import RequirementError
from llmkit.quantization.codec import CONFIG_KEYS, REMEDY, FolderReader, Specs, StoredFolder, meant_for
from llmkit.quantization.codecs.awq import CODEC as AWQ
from llmkit.quantization.codecs.compressed_tensors import CODEC as COMPRESSED_TENSORS
from llmkit.quantization.codecs.fp8 import CODEC as FLOAT8
from llmkit.quantization.codecs.gptq import CODEC as GPTQ
from llmkit.quantization.matrix import Restorable

_FIRST = "auto_round:auto_gptq"  # what its loader takes where nothing is said
_GPTQ_FORMS = {
    _FIRST: "gptq", "auto_round:gptq": "gptq", "auto_round:gptq:exllamav2": "gptq", "auto_round:gptq:marlin": "gptq",
    "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2", "auto_round:exllamav2": "gptq_v2",
}  # fmt: skip
_FLOAT4_FORMS = {"mx_fp": "mxfp4-pack-quantized", "nv_fp": "nvfp4-pack-quantized"}


class AutoRound(FolderReader):
    """Read, not written."""

    name = "auto-round"
    also = ("intel/auto-round",)
    config_file = "quantization_config.json"

    def recognise(self, specs: Specs, config: Mapping[str, Any]) -> tuple[str, Sequence[str]] | None:
        return None  # its tensors are those of other layouts; config.json alone tells it from them

    def matrices(self, stored: StoredFolder) -> tuple[Mapping[str, Restorable], set[str]]:
        reader, entry = _read_as(stored)
        return reader.matrices(replace(stored, config={**stored.config, CONFIG_KEYS[0]: entry}))

    def warnings(self, stored: StoredFolder) -> list[str]:
        kind, bits = stored.entry.get("act_data_type"), stored.entry.get("act_bits")
        if not isinstance(bits, int) or bits >= 16:
            return []
        return [meant_for(f"activations in {kind}{bits}")]


def _read_as(stored: StoredFolder) -> tuple[FolderReader, Mapping[str, Any]]:
    """The layout whose tensors they are, and how its config would say it.

    Raises:
        RequirementError: a form that is not read.
    """
    entry = stored.entry
    form = str(entry.get("packing_format") or entry.get("backend") or _FIRST)
    if form in _GPTQ_FORMS:
        return GPTQ, {**entry, GPTQ.form_key: _GPTQ_FORMS[form]}
    if form.startswith(("auto_round:auto_awq", "auto_round:awq")):
        return AWQ, {**entry, AWQ.form_key: "gemm"}
    if form.startswith("auto_round:fp8"):
        return FLOAT8, entry
    packed = _FLOAT4_FORMS.get(str(entry.get("data_type"))) if entry.get("bits") == 4 else None
    if form == "auto_round:llm_compressor" and packed is not None:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": entry.get("group_size")}
        group = {"targets": ["Linear"], "weights": weights, "format": packed}
        return COMPRESSED_TENSORS, {"config_groups": {"group_0": group}}
    raise RequirementError(
        f"{stored.label}: the packing_format {form[:60]!r} of AutoRound ({str(entry.get('data_type'))[:20]}, "
        f"{str(entry.get('bits'))[:20]} bits) is not read; expected {', '.join(_GPTQ_FORMS)} or auto_round:auto_awq",
        hint=REMEDY,
    )


CODEC = AutoRound()
