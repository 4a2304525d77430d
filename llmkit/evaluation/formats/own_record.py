"""llmkit's own record: of one run, or of the shards that make one."""

from __future__ import annotations

from llmkit.errors import InputError
from llmkit.evaluation.formats.format import ReportFormat
from llmkit.evaluation.report_inputs import ReportInputs


def _files(inputs: ReportInputs) -> dict[str, bytes]:
    if len(inputs.records) != 1:
        raise InputError(
            f"a record is of one run, and {len(inputs.records)} are given",
            hint="give all shards of one run: llmkit report run.shard-*.json -o run.json",
        )
    return {"": inputs.records[0].to_bytes()}


FORMAT = ReportFormat("record", "a record of llmkit eval", (".json",), _files, b'"llmkit.eval/')
