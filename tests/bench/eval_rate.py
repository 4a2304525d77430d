"""What a forward of `llmkit eval` reaches of the machine's matrix rate, by context length and by phase.

    python tests/bench/eval_rate.py MODEL --contexts 128,512,2048

A forward scores questions of --question tokens side by side that continue one shared prefix, as `eval` does it: the
last layer for their last rows, then the head. Time is processor time of one thread, so that other work on the machine
counts little; arithmetic is that of the matrix products (`llmkit/evaluation/cost.py`). The matrix rate is the best of
the model's own products over as many rows. Printed for each phase: its share of the time, its GFLOP/s, and that as a
share of the matrix rate.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.decoder.kv import KVCache
from llmkit.decoder.linear import Linear
from llmkit.decoder.load import load_decoder
from llmkit.decoder.model import Decoder
from llmkit.decoder.packed import Packed
from llmkit.evaluation.cost import Costs

SPENT: dict[str, float] = defaultdict(float)
FLOP: dict[str, float] = defaultdict(float)


def timed(phase: str, function: Callable[..., Any], flop: Callable[..., float]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        started = time.thread_time()
        result = function(*given, **named)
        SPENT[phase] += time.thread_time() - started
        FLOP[phase] += flop(result, *given)
        return result

    return call


def matrix_rate(decoder: Decoder, n_rows: int) -> float:
    """FLOP/s of the fastest of the products of a layer."""
    shapes = {tuple(s.shape) for s in decoder.model.slots.values() if len(s.shape) == 2 and s.layer == 0}
    best = 0.0
    for n_out, n_in in shapes:
        x, weight = torch.randn(n_rows, n_in), torch.randn(n_out, n_in)
        for _ in range(8):
            started = time.thread_time()
            torch.nn.functional.linear(x, weight)
            best = max(best, 2 * n_rows * n_in * n_out / (time.thread_time() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", default="128,512,1024,2048", help="tokens of the shared prefix")
    parser.add_argument("--question", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024, help="of one forward")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many is shown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    decoder = load_decoder(open_checkpoint(args.model))
    costs = Costs.of(decoder.model, decoder.dtype.itemsize)
    lengths = [args.question] * (args.tokens // args.question)
    rate = matrix_rate(decoder, sum(lengths))
    print(f"matrix rate {rate / 1e9:.0f} GFLOP/s; {len(lengths)} questions of {args.question} tokens")
    print("context   GFLOP/s of all, share | linear: time, rate, share | attention: time, rate, share | rest: time")
    n_layers = len(decoder.model.blocks)

    def linear_flop(result: torch.Tensor, layer: Linear, x: torch.Tensor) -> float:
        return 2.0 * x.shape[:-1].numel() * layer.weight.numel()

    Linear.__call__ = timed("linear", Linear.__call__, linear_flop)  # type: ignore[method-assign]
    Packed.attend = timed("attention", Packed.attend, lambda *_: 0.0)  # type: ignore[method-assign]
    for context in map(int, args.contexts.split(",")):
        with torch.inference_mode():
            prefix = KVCache()
            decoder.hidden(torch.randint(0, decoder.model.dims.vocab, (1, context)), prefix)
        ids = torch.randint(0, decoder.model.dims.vocab, (1, sum(lengths)))
        best: tuple[float, dict[str, float], float] | None = None
        for _ in range(args.repeat):
            SPENT.clear(), FLOP.clear()
            packed = Packed(prefix, lengths)
            started = time.thread_time()
            decoder.logits(decoder.hidden(ids, packed, rows=packed.ends))
            whole = time.thread_time() - started
            if best is None or whole < best[0]:
                best = whole, dict(SPENT), FLOP["linear"]
        assert best is not None
        whole, spent, linear = best
        seen = sum(costs.pair_flop * (n * (2 * context + n + 1) // 2) for n in lengths)
        attention = seen * (n_layers - 1) / n_layers  # of the last layer's, one row a question
        head = 2.0 * len(lengths) * decoder.model.dims.vocab * decoder.model.dims.hidden
        parts = []
        for name, flop in (("linear", linear), ("attention", attention)):
            parts.append(f"{spent[name] / whole:4.0%} {flop / spent[name] / 1e9:4.0f} {flop / spent[name] / rate:4.0%}")
        total = (linear + attention + head) / whole
        rest = 1 - sum(spent.values()) / whole
        print(f"{context:7}   {total / 1e9:4.0f} {total / rate:4.0%} | {' | '.join(parts)} | {rest:4.0%}")


if __name__ == "__main__":
    main()
