"""`model-index`, the older form of scores on the hub: an entry of the metadata at the beginning of a model's README.

Source: `huggingface_hub.repocard_data.eval_results_to_model_index`. The hub prefers `--format hub` today.
"""

from __future__ import annotations

from typing import Any

from llmkit.errors import InputError
from llmkit.evaluation.formats.format import ReportFormat
from llmkit.evaluation.formats.hub import conditions
from llmkit.evaluation.record import BenchResult, RunRecord
from llmkit.evaluation.report_inputs import ReportInputs
from llmkit.version import __version__


def _files(inputs: ReportInputs) -> dict[str, bytes]:
    import yaml

    models: dict[str, list[dict[str, Any]]] = {}
    for record in inputs.records:
        results = models.setdefault(str(record.model.get("label") or "model"), [])
        results += [_result(record, bench) for bench in record.benches.values()]
    if not any(models.values()):
        raise InputError(
            "no run of a benchmark to list", hint="llmkit report run.json --format model-index -o index.yaml"
        )
    index = [{"name": name, "results": results} for name, results in models.items() if results]
    text = yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
    return {"": f"# llmkit report {__version__}: goes into the metadata of README.md\n{text}".encode()}


def _result(record: RunRecord, bench: BenchResult) -> dict[str, Any]:
    named = bench.bench
    return {
        "task": {"type": "text-generation", "name": "Multiple choice"},
        "dataset": {"name": named.title, "type": named.dataset or named.name, "split": named.split},
        "metrics": [
            {
                "type": "acc",
                "name": f"accuracy ({conditions(record, bench)})",
                "value": round(100 * bench.reported.value, 2),
            }
        ],
    }


FORMAT = ReportFormat("model-index", "a model-index", (".yaml", ".yml"), _files, b"# llmkit report")
