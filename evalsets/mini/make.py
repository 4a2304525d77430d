"""Make the mini bench: `python evalsets/mini/make.py [--out DIR]` writes questions, text, base, delta and figures.

Everything follows from fixed seeds. It takes some minutes on two cores; what it measured goes to figures.json.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait sleep: other work on the machine costs less
if not __package__:  # run as a file: make the relative imports below work
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "evalsets.mini"

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from . import adapter, measure, vocabulary, world
from .prose import Prose, held_out_text
from .questions import Documents, Split, exam, splits, write_csv
from .train import Batches, Stage, new_model, train

TEXT_CHARACTERS = 30_000
BASE_SUBJECTS = dict.fromkeys(world.BASE_SUBJECTS, 1.0)
TUNED_SUBJECTS = dict.fromkeys(world.BASE_SUBJECTS, 0.5) | dict.fromkeys(world.TUNED_SUBJECTS, 1.5)
TAUGHT = dict.fromkeys(world.BASE_SUBJECTS + world.TUNED_SUBJECTS, 1.0)
BASE_STAGES = (
    Stage(steps=350, documents=40, items=1, drill=1.0, windows=0),
    Stage(steps=200, documents=8, items=6, drill=1.0, window=128),
    Stage(steps=150, documents=8, items=6, drill=0.5, window=128),
    Stage(steps=1400, documents=8, items=6, drill=0.12),
)
TUNED_STAGES = (Stage(steps=650, documents=8, items=6, drill=0.05),)
CONFIG_KEYS = (
    *("architectures", "attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size"),
    *("initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias", "model_type"),
    *("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta"),
    *("tie_word_embeddings", "torch_dtype", "use_cache", "vocab_size"),
)
ROPE = 10000.0
BASE_PEAK, TUNED_PEAK = 1.5e-3, 1e-3


def make_tokenizer(split: dict[str, Split], vale: world.World) -> Tokenizer:
    """Trained on questions and prose of every subject, and on the answers once more, so that most are one token."""
    everything = dict.fromkeys(world.SUBJECTS, 1.0)
    documents = Documents(split, everything, "tokenizer")
    questions = [documents.draw(6, 0.0) for _ in range(1500)]
    prose = list(islice(Prose(vale, everything).paragraphs("tokenizer"), 3000))
    answers = [" " + word for word in sorted({asking.right for part in split.values() for asking in part.train})]
    tokenizer = vocabulary.train_tokenizer(questions + prose + 300 * answers)
    vocabulary.letter_ids(tokenizer)  # each has to be one token
    return tokenizer


def halves(model: LlamaForCausalLM) -> measure.Weights:
    """The weights in half precision."""
    return {name: weight.detach().to(torch.float16).contiguous() for name, weight in model.state_dict().items()}


def subtract(tuned: measure.Weights, base: measure.Weights) -> measure.Weights:
    """The delta tuned - base, in half precision and in place, as FastChat's make_delta does."""
    return {name: weight.clone().sub_(base[name]) for name, weight in tuned.items()}


def add(base: measure.Weights, delta: measure.Weights) -> measure.Weights:
    """Apply a delta in half precision."""
    return {name: weight.clone().add_(delta[name]) for name, weight in base.items()}


def rotated(weights: measure.Weights, layers: int) -> measure.Weights:
    """A wrong base: the same tensors with each layer in the place of the next."""
    found = {}
    for name, weight in weights.items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str((int(parts[2]) + 1) % layers)
        found[".".join(parts)] = weight
    return found


def save_model(folder: Path, model: LlamaForCausalLM, weights: measure.Weights, tokenizer: Tokenizer) -> None:
    """A folder that transformers loads: config, weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    whole = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "float16",
        "rope_theta": ROPE,
    }
    config = {key: whole[key] for key in CONFIG_KEYS}
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    for name, value in (("config.json", config), ("generation_config.json", ends)):
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    vocabulary.save_tokenizer(tokenizer, folder)


def reporter(name: str, every: int = 50) -> Callable[[int, tuple[float, float, float]], None]:
    """Print the mean losses of every fifty steps."""
    started = time.monotonic()
    seen: list[tuple[float, float, float]] = []

    def report(step: int, losses: tuple[float, float, float]) -> None:
        seen.append(losses)
        if len(seen) == every:
            letters, hints, prose = (sum(column) / every for column in zip(*seen, strict=True))
            seconds = time.monotonic() - started
            print(f"{name} {step + 1:5}  letters {letters:.3f}  hints {hints:.3f}  prose {prose:.3f}  {seconds:.0f} s")
            sys.stdout.flush()
            seen.clear()

    return report


def figures_of(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    exams: measure.Exams,
    text: str,
    weights: measure.Weights,
    whole: bool,
) -> dict[str, Any]:
    """Perplexity and accuracy over all and by subject; on the whole also by number of shots, and after <s>."""
    measure.load(model, weights)
    by_subject = measure.accuracies(model, tokenizer, exams)
    found: dict[str, Any] = {"accuracy": measure.overall(by_subject, exams), "by_subject": by_subject}
    found["perplexity"] = measure.perplexity(model, tokenizer, text)
    if whole:
        shots = {str(k): measure.accuracies(model, tokenizer, exams, k) for k in (0, 1, 3, 5)}
        found["by_shots"] = {k: measure.overall(accuracy, exams) for k, accuracy in shots.items()}
        found["after_bos"] = measure.overall(measure.accuracies(model, tokenizer, exams, bos=True), exams)
    return found


def table(models: Mapping[str, dict[str, Any]]) -> str:
    """Accuracies in per cent, subjects down and models across."""
    lines = [f"{'subject':22}" + "".join(f"{name:>12}" for name in models)]
    for row in ("accuracy", "perplexity", *world.SUBJECTS):
        cells = (found[row] if row in found else found["by_subject"][row] for found in models.values())
        lines.append(f"{row:22}" + "".join(f"{cell:12.2f}" for cell in cells))
    return "\n".join(lines)


def file_facts(path: Path) -> dict[str, Any]:
    """The size and hash of a file."""
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def fill_readme(out: Path) -> None:
    """Put the figures into the README's table, where the folder has one."""
    readme = out / "README.md"
    if not readme.exists():
        return
    figures = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    models = figures["models"]
    rows = [["", *models], ["---", *("---:" for _ in models)]]
    rows.append(["all subjects, %", *(f"{found['accuracy']:.1f}" for found in models.values())])
    for subject, count in figures["questions"].items():
        cells = (f"{found['by_subject'][subject]:.1f}" for found in models.values())
        rows.append([f"{subject} ({count})", *cells])
    rows.append(["perplexity", *(f"{found['perplexity']:.2f}" for found in models.values())])
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    seconds, threads = figures["seconds"]["all"], figures["made_with"]["threads"]
    note = f"{figures['parameters']:,} parameters; `make.py` took {seconds} s with {threads} threads, and "
    note += f"{figures['seconds']['adapter']} s for the adapter."
    head, rest = readme.read_text(encoding="utf-8").split("<!-- figures -->\n")
    tail = rest.split("<!-- /figures -->")[1]
    text = f"{head}<!-- figures -->\n{lines}\n\n{note}\n<!-- /figures -->{tail}"
    readme.write_text(text, encoding="utf-8")


def shortened(stage: Stage, steps: float) -> Stage:
    """The stage with its steps scaled."""
    return replace(stage, steps=max(1, round(stage.steps * steps)))


def make(out: Path, steps: float = 1.0) -> None:
    """Write the whole bench under `out`; `steps` scales the training, for a quick look."""
    started = time.monotonic()
    vale = world.load_world()
    split = splits(vale.relations)
    exams = {subject: exam(subject, split[subject]) for subject in world.SUBJECTS}
    for subject, (dev, test) in exams.items():
        write_csv(out / "dev" / f"{subject}_dev.csv", dev)
        write_csv(out / "test" / f"{subject}_test.csv", test)
    text = held_out_text(Prose(vale, TAUGHT), TEXT_CHARACTERS)
    (out / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = make_tokenizer(split, vale)
    model = new_model(tokenizer, seed=world.SEED)
    scaled = {
        name: [shortened(stage, steps) for stage in stages]
        for name, stages in (("base", BASE_STAGES), ("tuned", TUNED_STAGES))
    }

    torch.manual_seed(world.SEED + 1)
    batches = Batches(
        tokenizer, Documents(split, BASE_SUBJECTS, "base"), Prose(vale, BASE_SUBJECTS).paragraphs("base"), 1
    )
    train(model, batches, scaled["base"], BASE_PEAK, reporter("base"))
    base = halves(model)
    save_model(out / "base", model, base, tokenizer)
    measure.load(model, base)
    batches = Batches(
        tokenizer,
        Documents(split, TUNED_SUBJECTS, "tuned"),
        Prose(vale, TUNED_SUBJECTS).paragraphs("tuned"),
        2,
    )
    train(model, batches, scaled["tuned"], TUNED_PEAK, reporter("tuned"))
    delta = subtract(halves(model), base)
    tuned = add(base, delta)
    save_model(out / "delta", model, delta, tokenizer)
    trained = time.monotonic() - started

    layers = model.config.num_hidden_layers
    fresh = halves(new_model(tokenizer, seed=world.SEED + 2))
    variants = {
        "base": base,
        "tuned": tuned,
        "int8": measure.quantized(tuned, 8),
        "int4": measure.quantized(tuned, 4),
        "wrong_base": add(rotated(base, layers), delta),
        "fresh_base": add(fresh, delta),
    }
    models = {
        name: figures_of(model, tokenizer, exams, text, weights, whole=name in ("base", "tuned"))
        for name, weights in variants.items()
    }
    files = [out / folder / name for folder in ("base", "delta") for name in ("model.safetensors", "tokenizer.json")]
    figures = {
        "questions": {subject: len(test) for subject, (_, test) in exams.items()},
        "shots": measure.SHOTS,
        "parameters": sum(weight.numel() for weight in base.values()),
        "models": models,
        "files": {path.relative_to(out).as_posix(): file_facts(path) for path in files},
        "seconds": {"training": round(trained), "all": round(time.monotonic() - started)},
        "made_with": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "machine": platform.machine(), "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    adapt(out, steps)


def adapt(out: Path, steps: float = 1.0) -> None:
    """Train the adapter on the base and delta under `out`, and add it and its figures."""
    started = time.monotonic()
    vale = world.load_world()
    split = splits(vale.relations)
    exams = {subject: exam(subject, split[subject]) for subject in world.SUBJECTS}
    tokenizer = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    model = new_model(tokenizer, seed=world.SEED)
    tuned = add(*(load_file(out / folder / "model.safetensors") for folder in ("base", "delta")))
    measure.load(model, tuned)
    stage = shortened(adapter.STAGE, steps)
    merged = adapter.train_adapter(out / "adapter", model, tokenizer, split, vale, stage, reporter("adapter"))
    text = (out / "text.txt").read_text(encoding="utf-8")
    figures = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    plain = new_model(tokenizer, seed=world.SEED)
    figures["models"]["adapter"] = figures_of(plain, tokenizer, exams, text, halves(merged), whole=False)
    print(table(figures["models"]))
    weights = out / "adapter" / "adapter_model.safetensors"
    figures["files"][weights.relative_to(out).as_posix()] = file_facts(weights)
    figures["seconds"]["adapter"] = round(time.monotonic() - started)
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    fill_readme(out)


def main() -> None:
    """Read the options and make the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where to write")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--steps", type=float, default=1.0, help="scale of the training, for a quick look")
    parser.add_argument("--only-adapter", action="store_true", help="train the adapter on the models that are there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    (adapt if options.only_adapter else make)(options.out, options.steps)


if __name__ == "__main__":
    main()
