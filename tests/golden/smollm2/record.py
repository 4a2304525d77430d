"""Record what transformers writes after prompts for SmolLM2-135M-Instruct: python tests/golden/smollm2/record.py.

In float32, greedily, past any end token; with transformers 5.24.0 and torch 2.13.0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
N_TOKENS = 32
CHAT = "<|im_start|>user\nWhy is the sky blue at noon, and red at dusk?<|im_end|>\n<|im_start|>assistant\n"

sys.path.insert(0, str(ROOT / "tests" / "bench"))
from smollm2 import default_folder, prepare  # noqa: E402 (beside the benchmarks)

source = prepare(default_folder())
tokenizer = AutoTokenizer.from_pretrained(source)
prompts = [
    tokenizer(text).input_ids for text in ("The history of the city of Lisbon begins", "def fibonacci(n):\n    ")
]
prompts.append(tokenizer(CHAT).input_ids)
prompts.append(tokenizer((ROOT / "evalsets/mini/text.txt").read_text()).input_ids[:700])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
model.generation_config.eos_token_id = None
texts = []
for prompt in prompts:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_TOKENS, do_sample=False)
    texts.append(found[0, len(prompt) :].tolist())
(HERE / "texts.json").write_text(json.dumps({"prompts": prompts, "texts": texts}) + "\n")
