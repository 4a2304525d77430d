"""Every verb on random configs of every family: what comes out computes what went in, or the verb refuses it by name.

    python -m tests.reliability.random_verbs [FAMILY …] [--count 2] [--seed 0] [--short] [--verbose]

The configs are those of `random_configs.py`, with a tokenizer; every second has the activation of the tiny model, which
llama.cpp knows. Decoding in odd steps is compared with one forward, graphs in ONNX Runtime with the decoder, a GGUF
file that is read again with the model, quantized weights with the weights as a step of their grid allows, a merged
adapter with the sum by hand, and scores behind a shared prefix with those of each request alone.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "transforms"))

import family_world as world
import torch
from safetensors.torch import save_file

from llmkit.api import save
from llmkit.architecture.architecture import Architecture
from llmkit.calibration.quantizer import CalibratedQuantizer
from llmkit.calibration.samples import Samples
from llmkit.calibration.texts import CalibrationText
from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.quantized import dequantized
from llmkit.decoder.contract import check_config, random_checkpoint, random_ids
from llmkit.decoder.kv import KVCache
from llmkit.decoder.load import load_decoder
from llmkit.decoder.model import Decoder
from llmkit.errors import LlmkitError
from llmkit.evaluation.engine import EngineOptions
from llmkit.evaluation.runner import make_lm
from llmkit.onnx.contract import check_graph
from llmkit.quantization.codec import folder_codec
from llmkit.transforms.convert import convert
from llmkit.transforms.layers import spelled_for
from llmkit.transforms.lora import merge, open_adapter
from llmkit.transforms.quantize import quantize
from reliability.against_transformers import PLUGINS, quietly, relative
from reliability.config_draws import random_config

__all__ = ["VERBS", "Outcome", "outcomes"]

TOLERANCE = 2e-5
_CONTEXTS = ("max_position_embeddings", "n_positions", "seq_length", "context_length", "max_seq_len")
_FILES = {
    "tokenizer.json": world.TOKENIZER,
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "e", "pad_token": "e"}',
}
ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function", "activation"}
_TEXT = "the quick brown fox jumps over the lazy dog. she sells sea shells on the sea shore. " * 20
_ASKED = [
    ("the quick brown fox " + q, a) for q in ("jumps over", "", "sells sea shells") for a in (" the", " other dog")
]


@dataclass(frozen=True)
class Case:
    """One model with a random config and random weights, on disk."""

    architecture: Architecture
    folder: Path

    @cached_property
    def base(self) -> Checkpoint:
        return open_checkpoint(self.folder / "base")

    @cached_property
    def decoder(self) -> Decoder:
        return load_decoder(self.base)

    @cached_property
    def ids(self) -> torch.Tensor:
        return random_ids(self.architecture, self.base.config)

    @cached_property
    def logits(self) -> torch.Tensor:
        return self.decoder(self.ids)

    @cached_property
    def tolerance(self) -> float:
        """What rounding explains: ten times what changes where each weight is the float32 above it or below it."""
        generator = torch.Generator().manual_seed(7)
        stored = world.loaded(self.base)
        near = {n: torch.nextafter(w, w + torch.randn(w.shape, generator=generator)) for n, w in stored.items()}
        (self.folder / "near").mkdir()
        save_file(near, self.folder / "near" / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(self.folder / "base" / "config.json", self.folder / "near")
        return max(TOLERANCE, 10 * relative(load_decoder(open_checkpoint(self.folder / "near"))(self.ids), self.logits))


def decoded(case: Case) -> float:
    """Prefills and steps of other lengths than one, without padding and behind it."""
    limit, worst = case.decoder.exact_sharing_limit, 0.0
    whole = case.ids if limit is None else case.ids[:, : min(limit, case.ids.shape[1])]
    if not whole.shape[1]:
        return worst
    window = next((case.base.config[k] for k in ("sliding_window", "window_size") if case.base.config.get(k)), 6)
    for n_padding in (0, 2):
        mask = torch.ones_like(whole)
        mask[0, :n_padding] = 0
        alone = [case.decoder(whole[:1, n_padding:]), case.decoder(whole[1:])]
        for first in {1, 3, min(int(window) + 1, 20)} - {0}:
            cache, parts, start = KVCache(), [], 0
            for length in (max(first, n_padding + 1), 1, 2, 5, 1, 40):
                stop = start + length
                if start < whole.shape[1]:
                    parts.append(case.decoder(whole[:, start:stop], cache, mask[:, :stop] if n_padding else None))
                start = stop
            found = torch.cat(parts, 1)
            worst = max(worst, relative(found[:1, n_padding:], alone[0]), relative(found[1:], alone[1]))
    return worst


def held(case: Case) -> float:
    """The contract of plugins, but for parity: names, caches, padding, packed and branched sequences."""
    checks = [c for of in ("names", "= whole") for c in check_config(case.architecture, case.base.config, of=of)]
    wrong = [c for c in checks if c.problem and (c.difference is None or c.difference > case.tolerance)]
    assert not wrong, "; ".join(f"{c.name}: {c.problem}" for c in wrong)
    return max((c.difference or 0.0 for c in checks), default=0.0)


def exported(case: Case) -> float | None:
    """The graph in ONNX Runtime: prefill, cached steps, a padded batch."""
    check = check_graph(case.architecture, case.base.config)
    if check.note:
        raise Refused(check.note)
    assert check.difference is not None, check.problem
    return check.difference


def in_gguf(case: Case) -> float:
    """A GGUF file in float32, read again."""
    save(convert(case.base, to="gguf", type="f32"), case.folder / "gguf")
    return relative(load_decoder(open_checkpoint(case.folder / "gguf"))(case.ids), case.logits)


def rounded(case: Case, *, method: str = "rtn") -> float:
    """Codes of four bits, read again: `rtn` half a step from the weights, and what is read is what is computed."""
    floats = spelled_for(case.base, folder_codec("compressed-tensors"))
    samples = Samples(CalibrationText("a text", (_TEXT,)), n=3, length=16)
    quantizer = CalibratedQuantizer(floats, samples) if method != "rtn" else None
    save(quantize(case.base, bits=4, group_size="channel", method=method, quantizer=quantizer), case.folder / method)
    quantized = open_checkpoint(case.folder / method)
    plain, base = dequantized(quantized), world.loaded(case.base)
    assert len(quantized.tensors) > len(plain.tensors), "no weight has codes"
    if method == "rtn":
        for module in world.layers_of(case.base):
            weight, found = base[f"{module}.weight"], plain.tensors[f"{module}.weight"].load()
            assert ((found - weight).abs() <= weight.abs().amax(-1, keepdim=True) / 15 * 1.001).all(), module
    save(plain, case.folder / f"{method} plain")
    return relative(
        load_decoder(quantized)(case.ids), load_decoder(open_checkpoint(case.folder / f"{method} plain"))(case.ids)
    )


def merged(case: Case) -> float:
    """A random adapter on every linear layer."""
    layers = world.adapted_layers_of(case.base)
    expected = world.adapter_by_hand(case.base, case.folder / "adapter", layers)
    save(merge(case.base, [open_adapter(case.folder / "adapter")]), case.folder / "merged")
    found = world.loaded(open_checkpoint(case.folder / "merged"))
    expected = world.loaded(case.base) | expected
    assert found.keys() == expected.keys()
    return max(relative(found[name], weight) for name, weight in expected.items())


def scored(case: Case) -> float:
    """Requests that share what they begin with, together and each alone."""
    from lm_eval.api.instance import Instance

    def asked(pairs: list[tuple[str, str]]) -> list[float]:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=p, idx=i, metadata=("t", i, 1))
            for i, p in enumerate(pairs)
        ]
        return [score for score, _ in make_lm(case.base, EngineOptions(batch_tokens=100)).loglikelihood(requests)]

    together, alone = asked(_ASKED), [asked([pair])[0] for pair in _ASKED]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(together, alone, strict=True))


VERBS: dict[str, Callable[[Case], float | None]] = {
    "decode": decoded, "contract": held, "export": exported, "gguf": in_gguf, "rtn": rounded,
    "gptq": partial(rounded, method="gptq"), "merge": merged, "eval": scored,
}  # fmt: skip


class Refused(Exception):
    """A verb does not do it, and says so."""


@dataclass(frozen=True)
class Outcome:
    """One verb on one config."""

    verb: str
    verdict: str
    words: str = ""


def outcomes(name: str, count: int, seed: int, verbs: list[str]) -> Iterator[tuple[dict[str, Any], list[Outcome]]]:
    """`count` random configs of a family that llmkit computes to finite logits, and what each verb made of them."""
    done, number = 0, 0
    with quietly():
        while done < count and number < 40 * count:
            draw = random.Random(f"verbs {name} {seed} {number}")
            number += 1
            with tempfile.TemporaryDirectory() as folder:
                case = Case(PLUGINS[name], Path(folder))
                try:
                    config = _config(name, draw, is_plain=done % 2 == 0)
                    files = {n: FileContent(data=text.encode()) for n, text in _FILES.items()}
                    save(random_checkpoint(PLUGINS[name], config).derive(files=files), case.folder / "base")
                    if not case.logits.isfinite().all():
                        continue
                except LlmkitError:  # `random_configs.py` looks into it
                    continue
                done += 1
                yield config, [_outcome(verb, case) for verb in verbs]


def _config(name: str, draw: random.Random, *, is_plain: bool) -> dict[str, Any]:
    """With a row for each token of the tokenizer, and room for the texts."""
    config = random_config(name, draw)
    if is_plain:
        tiny = PLUGINS[name].tiny_config()
        config = {k: v for k, v in config.items() if k not in ACTIVATIONS} | {
            k: tiny[k] for k in ACTIVATIONS & tiny.keys()
        }
    config = world.with_rows(PLUGINS[name], config)
    return config | {key: max(config[key], 64) for key in _CONTEXTS if isinstance(config.get(key), int)}


def _outcome(verb: str, case: Case) -> Outcome:
    try:
        difference = VERBS[verb](case)
    except (Refused, LlmkitError) as error:
        return Outcome(verb, "refused", str(error))
    except Exception as error:  # noqa: BLE001 - a crash is the worst of differences
        return Outcome(verb, "WRONG", f"{type(error).__name__}: {error}")
    limit = max(case.tolerance, 1e-4 if verb == "export" else 0.0)
    return Outcome(verb, "equal" if difference is None or difference <= limit else "WRONG", f"{difference}")


def main() -> int:
    """A line for each family; what went wrong with its config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help="all by default")
    parser.add_argument("--verb", action="append", choices=VERBS, help="only these; all by default")
    parser.add_argument("--count", type=int, default=2, help="configs of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="every eighth family, one config")
    parser.add_argument("--verbose", action="store_true", help="refusals, too")
    args = parser.parse_args()
    names = args.family or [*PLUGINS][:: 8 if args.short else 1]
    total: Counter[str] = Counter()
    for name in names:
        counts: Counter[str] = Counter()
        for config, found in outcomes(name, 1 if args.short else args.count, args.seed, args.verb or [*VERBS]):
            counts.update(o.verdict for o in found)
            for o in found:
                if o.verdict == "WRONG" or (args.verbose and o.verdict == "refused"):
                    print(f"{name} {o.verb}: {o.verdict}: {o.words:.400}\n  {json.dumps(config)}")
        print(f"{name}: {dict(counts)}", flush=True)
        total += counts
    print(f"all: {dict(total)}")
    return int(total["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
