"""lm-eval's own task definitions over a few documents of our own, in the forms that the published data have."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval.tasks
import yaml

TASKS = Path(lm_eval.tasks.__file__).parent
NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gail", "Hugo"]
THINGS = ["apples", "stones", "boats", "lamps", "spoons", "kites", "coins", "maps"]
STEPS = [
    ("fills the kettle", "sets it on the stove and waits for the water to boil", "paints it with a wide brush"),
    ("opens the letter", "reads it twice and puts it into a drawer", "plants it in the garden and waters it"),
    ("ties the boat to the pier", "climbs up the ladder with the fish", "drives it along the road to town"),
    ("peels the potatoes", "cuts them into slices and fries them", "reads them aloud to the children"),
]


def problem(i: int) -> tuple[str, str]:
    """A sum in words, and its answer as GSM8K writes it."""
    name, thing, a, b = NAMES[i % 8], THINGS[(i * 3) % 8], 3 + i % 7, 2 + i % 5
    question = f"{name} has {a} boxes with {b} {thing} each and finds {i + 1} more. How many {thing} are there?"
    total = a * b + i + 1
    return question, f"{name} has {a} * {b} = {a * b} {thing} in boxes. {a * b} + {i + 1} = {total}.\n#### {total}"


def _arc(i: int) -> dict:
    question, answer = problem(i)
    right = answer.rpartition(" ")[2]
    texts = [right, str(int(right) + 1), f"{right} boxes", "none of them"]
    texts = texts[i % 4 :] + texts[: i % 4]
    return {"id": str(i), "question": question, "choices": {"text": texts, "label": list("ABCD")},
            "answerKey": "ABCD"[texts.index(right)]}  # fmt: skip


def _hellaswag(i: int) -> dict:
    first, right, wrong = STEPS[i % 4]
    name = NAMES[i % 8]
    endings = [f"{wrong}.", f"{right}.", f"{wrong} and sleeps.", f"sings to {NAMES[(i + 3) % 8]}."]
    return {"ind": i, "activity_label": "Daily life", "ctx_a": f"{name} {first}.", "ctx_b": "then",
            "ctx": f"{name} {first}. then", "endings": endings, "label": "1", "split": "val",
            "source_id": str(i), "split_type": "indomain"}  # fmt: skip


def _piqa(i: int) -> dict:
    first, right, wrong = STEPS[i % 4]
    pair = [f"{NAMES[i % 8]} {right}", f"{NAMES[i % 8]} {wrong}"]
    return {"goal": f"What comes after someone {first}?", "sol1": pair[i % 2], "sol2": pair[1 - i % 2], "label": i % 2}


def _winogrande(i: int) -> dict:
    a, b = NAMES[i % 8], NAMES[(i + 1) % 8]
    return {"sentence": f"{a} gave {b} {THINGS[i % 8]} because _ had too many of them.", "option1": a, "option2": b,
            "answer": str(1 + i % 2)}  # fmt: skip


def _page(i: int) -> dict:
    lines = [" ".join(problem(i * 7 + j)).replace(".", " .") for j in range(1 + 4 * (i % 3))]
    return {"page": f" = {NAMES[i % 8]} and the {THINGS[i % 8]} = \n\n " + "\n ".join(lines) + "\n"}


def _gsm8k(i: int) -> dict:
    question, answer = problem(i)
    return {"question": question, "answer": answer}


# name -> (lm-eval's definition, a document, what is changed)
KINDS = {
    "arc_easy": ("arc/arc_easy.yaml", _arc, {}),
    "hellaswag": ("hellaswag/hellaswag.yaml", _hellaswag, {}),
    "piqa": ("piqa/piqa.yaml", _piqa, {}),
    "winogrande": ("winogrande/default.yaml", _winogrande, {}),
    "wikitext": ("wikitext/wikitext.yaml", _page, {}),
    "gsm8k": ("gsm8k/gsm8k.yaml", _gsm8k, {}),
    # IFEval's own metrics need packages of their own; its requests are open prompts without a stop string
    "ifeval": ("gsm8k/gsm8k.yaml", _gsm8k, {"doc_to_text": "{{question}} Answer in one word.", "num_fewshot": 0}),
}


def load(folder: Path, names: list[str], n: int, *, new_tokens: int | None = None) -> dict:
    """lm-eval's tasks by name, with `n` documents each; the first of others are the examples.

    Args:
        folder: for the data and the definitions.
        new_tokens: of an answer at most; None takes the task's.
    """
    for name in names:
        definition, document, changes = KINDS[name]
        files = {}
        for split, start in (("train", 1000), ("validation", 0), ("test", 0)):
            files[split] = str(folder / f"{name}.{split}.jsonl")
            rows = [json.dumps(document(start + i)) + "\n" for i in range(n)]
            Path(files[split]).write_text("".join(rows), encoding="utf-8")
        config = {"include": str(TASKS / definition), "task": f"small_{name}", "tag": None, "dataset_path": "json",
                  "dataset_name": None, "dataset_kwargs": {"data_files": files}, **changes}  # fmt: skip
        if name in ("gsm8k", "ifeval"):
            until = ["Question:", "</s>", "<|im_end|>"] if name == "gsm8k" else []
            longest = {} if new_tokens is None else {"max_gen_toks": new_tokens}
            config["generation_kwargs"] = {"until": until, "do_sample": False, "temperature": 0.0, **longest}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return manager.load([f"small_{name}" for name in names])
