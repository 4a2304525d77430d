"""PEFT's configurations × families: what llmkit merges is what the live model's `merge_and_unload` gives, to the bit.

For each cell a tiny model of the family is wrapped by PEFT, every trained tensor is moved, and the adapter is saved.
Merged by llmkit it has to be the merged model of PEFT, tensor by tensor and bit by bit; where the two store different
tensors (an end that one of them ties), it has to compute the live model's logits. What llmkit refuses it refuses with
a reason, and only configurations that are listed here as refused.

    python tests/reliability/peft_table.py [--family NAME …] [--kind WORD …] [--short] [--verbose]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch
import transformers
from safetensors.torch import load_file

import llmkit
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.errors import LlmkitError
from llmkit.transforms.lora import merge, open_adapter
from reliability.against_transformers import PLUGINS, described, quietly
from reliability.peft_kinds import KINDS, Facts, Kind

__all__ = ["FAMILIES", "Cell", "check", "facts_of"]

LOGITS = 1e-4  # relative to the largest; where stored tensors differ
LOGITS_IN_HALF = 5e-2  # a tied embedding is rounded once more than the live one: Gemma 4 3.6e-2
NEAR = 1e-6  # of the largest element of a tensor: another order of sums
# Models that no plugin describes: stacked experts, a plain decoder, one with Conv1D layers.
FOREIGN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmo2": {},
    "starcoder2": {},
    "cohere": {},
    "gpt_bigcode": {},
}
# Families that PEFT cannot adapt by the class that transformers has for them, and why.
NOT_ADAPTED = {"mistral4": "transformers has no causal language model of this model_type alone"}
_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


@cache
def _configs() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, architecture in PLUGINS.items():
        config = described(architecture, architecture.tiny_config())
        if config is not None:
            found[name] = config
    if "llama" in found:
        found["llama, tied"] = {**found["llama"], "tie_word_embeddings": True}
        found["llama with biases"] = {**found["llama"], "attention_bias": True, "mlp_bias": True}
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    for name, extra in FOREIGN.items():
        if name in known:
            found[name] = {"model_type": name, **_SIZES, **extra}
    return found


FAMILIES = tuple(_configs())


@cache
def model_of(family: str) -> Any:
    """A tiny random model in float32, with weights of a size that makes rounding mean something."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy(_configs()[family]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.02 if p.dim() == 1 else 0.1))
    return model


@cache
def facts_of(family: str) -> Facts:
    """What configurations need to know of a model."""
    model = model_of(family)
    layers = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    names = {id(m): n for n, m in model.named_modules()}
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(embed), id(head)}
    linear = [n for n, m in model.named_modules() if isinstance(m, layers) and id(m) not in ends]
    norms = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()]
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3 and p.shape[0] > 1 and "bias" not in n]
    attention = [n for n in linear if "attn" in n or "attention" in n] or linear
    return Facts(
        linear=tuple(dict.fromkeys(n.rpartition(".")[2] for n in linear)),
        attention=tuple(dict.fromkeys(n.rpartition(".")[2] for n in attention)),
        modules=tuple(linear),
        norms=tuple(dict.fromkeys(n.rpartition(".")[2] for n in norms)),
        embed=names[id(embed)].rpartition(".")[2],
        head=names[id(head)].rpartition(".")[2] if head is not None else "",
        stacks=tuple(dict.fromkeys(n.rpartition(".")[2] for n in stacks)),
        is_conv1d=any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in model.modules()),
    )


@dataclass(frozen=True)
class Cell:
    """One configuration on one family.

    Attributes:
        verdict: `bits`, `near`, `logits`, `refused`, `none` (PEFT does not make or merge it), or `WRONG`.
        detail: the reason, or what differs.
    """

    family: str
    kind: str
    verdict: str
    detail: str = ""

    @property
    def is_right(self) -> bool:
        return self.verdict != "WRONG"


def check(family: str, kind: Kind) -> Cell:
    """Make the adapter, merge it on both sides, compare."""
    with tempfile.TemporaryDirectory() as name, quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict, detail = _check(family, kind, Path(name))
    return Cell(family, kind.name, verdict, detail)


def _check(family: str, kind: Kind, folder: Path) -> tuple[str, str]:
    if family in NOT_ADAPTED:
        return "none", NOT_ADAPTED[family]
    facts = facts_of(family)
    config = kind.make(facts)
    if config is None:
        return "none", "does not apply"
    try:
        model = copy.deepcopy(model_of(family))
        model.to(kind.dtype).save_pretrained(folder / "base")
        live = _trained(copy.deepcopy(model_of(family)), config, folder, kind)
    except Exception as error:  # noqa: BLE001 - whatever PEFT raises is that it does not make this adapter
        return "none", f"PEFT: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    try:
        made = merge(open_checkpoint(folder / "base"), [open_adapter(folder / "adapter")])
        found = {n: t.load() for n, t in made.tensors.items()}
    except LlmkitError as error:
        if kind.is_refused:
            return "refused", error.message
        if _peft_merged(folder, kind) is None:
            return "none", "PEFT does not merge it"
        return "WRONG", f"refused: {error.message}"
    if kind.is_refused:
        return "WRONG", "merged, though it is listed as refused"
    merged = _peft_merged(folder, kind)
    if merged is None:
        return "WRONG", "merged, and PEFT does not"
    return _compared(found, made, merged, live, folder, kind)


def _trained(model: Any, config: Any, folder: Path, kind: Kind) -> Any:
    torch.manual_seed(1)
    live = peft.get_peft_model(model, config)
    more = {}
    if kind.is_converted:
        live.peft_config["default"].init_lora_weights = True
        live.save_pretrained(folder / "start")
        live.peft_config["default"].init_lora_weights = kind.is_converted
        more["path_initial_model_for_weight_conversion"] = str(folder / "start")
    with torch.no_grad():
        for name, p in live.named_parameters():
            if p.requires_grad or any(f".{part}" in name for part in ("lora_", "hada_", "lokr_", "ia3_")):
                p.add_(torch.randn_like(p) * 0.1)
    live.save_pretrained(folder / "adapter", **more)
    return live.eval()


def _peft_merged(folder: Path, kind: Kind) -> Any:
    """PEFT's merged model of the saved base and adapter; None where it cannot."""
    try:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=kind.dtype)
        return peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().eval()
    except Exception:  # noqa: BLE001 - as above
        return None


def _compared(
    found: dict[str, torch.Tensor], made: Any, merged: Any, live: Any, folder: Path, kind: Kind
) -> tuple[str, str]:
    with contextlib.suppress(RuntimeError):  # transformers saves no ends that are tied in another way than it ties them
        merged.save_pretrained(folder / "merged")
    expected: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "merged").glob("*.safetensors")):
        expected |= load_file(file)
    for theirs, ours in made.architecture.names.respelled.items():
        expected = {name.replace(theirs, ours): tensor for name, tensor in expected.items()}
    if set(found) == set(expected):
        differing = [n for n in expected if not torch.equal(found[n], expected[n])]
        if not differing:
            return "bits", ""
        if all(_is_near(found[n], expected[n]) for n in differing):
            return "near", f"{len(differing)} tensors"
    llmkit.save(made, folder / "out")
    return _by_logits(live, folder, kind)


def _by_logits(live: Any, folder: Path, kind: Kind) -> tuple[str, str]:
    """What the live model computes is what counts: merging ends that share memory, PEFT adds to both of them."""
    bound = LOGITS
    if kind.dtype is not torch.float32:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=kind.dtype)
        live, bound = peft.PeftModel.from_pretrained(base, folder / "adapter").eval(), LOGITS_IN_HALF
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=kind.dtype).eval()
    ids = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want, have = live(input_ids=ids).logits.float(), ours(input_ids=ids).logits.float()
    error = float((have - want).abs().max() / want.abs().max())
    return ("logits", f"{error:.1e}") if error <= bound else ("WRONG", f"logits {error:.1e} from the live model's")


def _is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    step = {torch.float32: NEAR, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[found.dtype]
    return bool((found.float() - expected.float()).abs().max() <= step * expected.float().abs().max())


def cells(families: Sequence[str], kinds: Sequence[Kind]) -> Iterator[Cell]:
    """Every cell, family by family."""
    for family in families:
        for kind in kinds:
            yield check(family, kind)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what each cell is; 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", default=FAMILIES)
    parser.add_argument("--kind", nargs="*", default=None, help="words in the names of configurations")
    parser.add_argument("--short", action="store_true", help="every twelfth configuration")
    parser.add_argument("--verbose", action="store_true", help="a line for each cell, not for each that is no bits")
    given = parser.parse_args(argv)
    kinds = [k for k in KINDS if not given.kind or any(word in k.name for word in given.kind)]
    kinds = kinds[::12] if given.short else kinds
    started, counts, reasons, merged = time.monotonic(), Counter(), Counter(), set()
    for cell in cells(given.family, kinds):
        counts[cell.verdict] += 1
        if cell.verdict == "refused":
            reasons[(cell.kind, cell.detail.partition(": ")[2])] += 1
        elif cell.verdict != "none":
            merged.add(cell.kind)
        if given.verbose or not cell.is_right:
            print(f"{cell.verdict:8} {cell.family:18} {cell.kind:32} {cell.detail}", flush=True)
    for (kind, reason), n in sorted(reasons.items()):
        print(f"refused  {kind:32} x {n}: {reason}")
    print(
        f"{len(given.family)} families x {len(kinds)} configurations in {time.monotonic() - started:.0f} s, "
        f"{len(merged)} of them merged; cells: " + ", ".join(f"{n} {v}" for v, n in counts.most_common())
    )
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
