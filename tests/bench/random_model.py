"""A model with random weights and the tokenizer of another, for benchmarks of families without a small published model.

    python tests/bench/random_model.py CONFIG.json TOKENIZER_FOLDER OUT [--seed 0]

CONFIG.json is a config of transformers; its vocabulary must hold the tokenizer's. Weights are those that transformers'
class starts with, so that both sides of a benchmark read one folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    values = json.loads(args.config.read_text())
    torch.manual_seed(args.seed)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
