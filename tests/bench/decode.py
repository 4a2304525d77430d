"""Tokens after a prompt with llmkit's decoder and with transformers' `generate`, in turns, in one process.

    OMP_NUM_THREADS=1 python tests/bench/decode.py MODEL --prompt 128 --tokens 64

Greedy, float32, with a cache on both sides. What is counted is the CPU time of the process, the best of --repeat: of
one token (the prompt), and of --tokens more. Exit code 0 when both give the same tokens; else 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=128, help="its tokens, at random")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


def timed(run: Callable[[int], list[int]], n: int) -> tuple[float, list[int]]:
    started = time.process_time()
    tokens = run(n)
    return time.process_time() - started, tokens


def main() -> int:
    args = arguments()
    from transformers import AutoModelForCausalLM

    import llmkit
    from llmkit.decoder.generate import generate

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    ours = llmkit.load_decoder(llmkit.open_checkpoint(args.model), dtype="float32")
    seed = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, theirs.config.vocab_size, (1, args.prompt), generator=seed)
    mask = torch.ones_like(prompt)

    def of_theirs(n: int) -> list[int]:
        made = theirs.generate(prompt, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)
        return made[0, args.prompt :].tolist()

    sides: dict[str, Callable[[int], list[int]]] = {
        "llmkit": lambda n: generate(ours, prompt.tolist(), max_new_tokens=n)[0],
        "transformers": of_theirs,
    }
    first, whole, texts = {}, {}, {}
    with torch.inference_mode():
        for _ in range(args.repeat):
            for name, run in sides.items():
                seconds, _ = timed(run, 1)
                first[name] = min(seconds, first.get(name, seconds))
                seconds, texts[name] = timed(run, 1 + args.tokens)
                whole[name] = min(seconds, whole.get(name, seconds))
    rates = {name: args.tokens / (whole[name] - first[name]) for name in sides}
    for name in sides:
        print(f"{name:<13} prompt {first[name]:.3f} s   then {rates[name]:.1f} tokens a second")
    prompts, tokens = first["transformers"] / first["llmkit"], rates["llmkit"] / rates["transformers"]
    print(f"ratio         prompt {prompts:.2f}   tokens {tokens:.2f}")
    print(f"the tokens are {'the same' if texts['llmkit'] == texts['transformers'] else 'NOT the same'}")
    return 0 if texts["llmkit"] == texts["transformers"] else 1


if __name__ == "__main__":
    sys.exit(main())
