"""The hub's `.eval_results/BENCHMARK.yaml`: scores that it shows on the model's page and on the dataset's leaderboard.

Source: https://huggingface.co/docs/hub/eval-results, and `huggingface_hub.EvalResultEntry`. The values are percentages,
as in its examples. A dataset's task ids are given by its own `eval.yaml`; benchmarks go under their own name.
"""

from __future__ import annotations

from typing import Any

from llmkit.errors import InputError
from llmkit.evaluation.formats.format import ReportFormat, file_part
from llmkit.evaluation.record import BenchResult, RunRecord
from llmkit.evaluation.report_inputs import ReportInputs
from llmkit.version import __version__


def _files(inputs: ReportInputs) -> dict[str, bytes]:
    import yaml

    files: dict[str, bytes] = {}
    for record in inputs.records:
        for name, bench in record.benches.items():
            path = f".eval_results/{file_part(name)}.yaml"
            if path in files:
                raise InputError(
                    f"two of the runs are of {bench.bench.title}, and a model's page shows one",
                    hint="llmkit report RUN.json --format hub -o MODEL, once for each model",
                )
            if bench.bench.dataset:
                text = yaml.safe_dump([_entry(record, bench)], sort_keys=False, allow_unicode=True)
                files[path] = f"# llmkit report {__version__}\n{text}".encode()
    if not files:
        raise InputError("no run of a benchmark that has a dataset on the hub", hint="mmlu, ceval and cmmlu have one")
    return files


def _entry(record: RunRecord, bench: BenchResult) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "dataset": {"id": bench.bench.dataset, "task_id": bench.bench.name},
        "value": round(100 * bench.reported.value, 2),
    }
    if record.created:
        entry["date"] = record.created.replace("+00:00", "Z")
    return entry | {"notes": conditions(record, bench)}


def conditions(record: RunRecord, bench: BenchResult) -> str:
    """What has to be known to compare the figure: shots, protocol, dtype, quantization, subjects that are missing."""
    model, settings = record.model, record.settings
    parts = [f"{bench.shots}-shot", f"{bench.micro.n} questions", f"protocol {bench.protocol}"]
    parts += ["mean of subjects"] if bench.average == "macro" else []
    parts += [f"prompt format {settings['prompt_format']}"] if settings.get("prompt_format") else []
    parts += [str(model[key]) for key in ("dtype", "quantization") if model.get(key)]
    parts += [f"without {len(bench.missing)} subjects"] if bench.missing else []
    return ", ".join([*parts, f"llmkit {record.versions.get('llmkit', __version__)}"])


FORMAT = ReportFormat("hub", "a folder with .eval_results", (), _files, b"# llmkit report")
