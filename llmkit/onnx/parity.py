"""The check after an export: the folder's logits against the torch decoder's, on random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import ids_with
from llmkit.lazy_imports import torch
from llmkit.onnx.kv_cache import RoundedDecoder, scales_in
from llmkit.onnx.model import ACCURACY
from llmkit.onnx.opening import PROVIDERS, load_onnx

# By compute dtype: what rounding leaves of logits of order one. Half precision rounds at every node.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# Some models magnify rounding: SmolLM2 in int4 differs from itself by 3e-4, computed by torch in another order. The
# tolerance is then a multiple of what the torch decoder shows, up to a size that no wrong weight stays below.
_OWN_FACTOR, _MOST = 4.0, 1e-2
# An int8 cache is compared with a torch cache that rounds to the same codes. A key that lies between two codes may go
# to one here and to the other there; a few such change a small share of what the rounding of all of them does. Scales
# that are wrong by a tenth change more than half (tests/onnx/test_kv_cache.py).
_CACHE_SHARE = 0.25
_N_TOKENS = 32
N_STEPS = 12  # tokens of the case "cached steps"
_TIE = 1e-5  # of the largest logit: which of two tokens that are as likely comes first is no difference


@dataclass(frozen=True, slots=True)
class Difference:
    """One comparison.

    Attributes:
        case: what was computed.
        largest: the largest difference of logits, relative to the largest logit where that is above one.
        same_choice: share of places with the same most likely token, or one that is as likely.
    """

    case: str
    largest: float
    same_choice: float


@dataclass(frozen=True)
class ParityReport:
    """What a check found.

    Attributes:
        differences: each within `tolerance`, or the check failed. The tolerance is that of the dtype, or more where
            the torch decoder itself differs by as much from one order of sums to another.
        measured: what int8 activations add, where products with integers round to them, and an int8 cache. Random
            tokens are far from what a model was trained on and magnify it, so there is no right and wrong; perplexity
            says more.
        basis: why the tolerance is more than that of the dtype.
    """

    differences: Sequence[Difference]
    measured: Sequence[Difference]
    tolerance: float
    basis: str = ""

    @property
    def failed(self) -> list[Difference]:
        """Differences above the tolerance."""
        return [d for d in self.differences if not d.largest <= self.tolerance]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        parity, measured = ([asdict(d) for d in group] for group in (self.differences, self.measured))
        return {"parity": parity, "tolerance": self.tolerance} | ({"as_it_runs": measured} if measured else {})


def has_provider(provider: str) -> bool:
    """Whether the ONNX Runtime that is installed has it."""
    import onnxruntime

    return PROVIDERS[provider] in onnxruntime.get_available_providers()


def check_folder(folder: Path, reference: Checkpoint, *, dtype: str, provider: str = "cpu") -> ParityReport:
    """Compare an exported folder with the torch decoder of `reference`, the floats that its graph computes with.

    Args:
        dtype: the compute dtype of the graph.
        provider: what runs it.
    """
    architecture = registry.require(reference.config, reference.label)
    suffix = architecture.prompt_suffix_of(reference.config)
    exported = load_onnx(folder, provider=provider)
    wanted: Any = load_decoder(reference)
    measured, of_cache = [], 0.0
    if scales := scales_in(folder):
        floats, wanted = wanted, RoundedDecoder(wanted, scales)
        ids = _prompts(wanted, suffix)
        measured.append(difference_of("int8 cache against one in floats", wanted(ids), floats(ids)))
        of_cache = measured[0].largest * _CACHE_SHARE
    if exported.parts.metadata.get(ACCURACY, "0") == "4":
        ids = _prompts(wanted, suffix)
        measured.append(difference_of("prefill, int8 activations", exported(ids), wanted(ids)))
        # The check is of weights and graph: what int8 activations add would hide a wrong scale.
        exported = load_onnx(folder, provider=provider, exact=True)
    own_error = min(_OWN_FACTOR * own_difference(wanted, suffix=suffix), _MOST)
    tolerance, basis = max(
        (TOLERANCES[dtype], ""),
        (own_error, "torch itself differs by a quarter of it from batch to batch"),
        (of_cache, "a quarter of what an int8 cache changes in torch: values between two codes go to either"),
    )
    return ParityReport(compare_decoders(exported, wanted, suffix=suffix), measured, tolerance, basis)


def own_difference(wanted: Any, *, suffix: tuple[int, ...] = ()) -> float:
    """The largest difference of a decoder's logits from its own for one row, beside a row with padding and without."""
    ids = _prompts(wanted, suffix)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return difference_of("own", wanted(ids, mask=mask)[1:], wanted(ids)[1:]).largest


def compare_decoders(
    exported: Any, wanted: Any, *, suffix: tuple[int, ...] = (), n_vocab: int | None = None
) -> list[Difference]:
    """Prefill, cached steps, and a batch with padding on the left.

    Args:
        exported: the decoder to check.
        wanted: the one to check against.
        suffix: ids that every prompt must hold (`Architecture.prompt_suffix`).
        n_vocab: number of tokens, where no architecture tells it.
    """
    ids = _prompts(wanted, suffix, n_vocab)
    expected = wanted(ids)

    def steps(decoder: Any) -> torch.Tensor:
        cache = decoder.new_cache()
        parts = [decoder(ids[:, : N_STEPS - 4], cache)]
        parts += [decoder(ids[:, i : i + 1], cache) for i in range(N_STEPS - 4, N_STEPS)]
        return torch.cat(parts, 1)

    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padded = wanted(ids, mask=mask), exported(ids, mask=mask)
    return [
        difference_of("prefill", exported(ids), expected),
        difference_of("cached steps", steps(exported), steps(wanted)),
        difference_of("left-padded row", padded[1][:1, 2:], padded[0][:1, 2:]),
        difference_of("row beside it", padded[1][1:], padded[0][1:]),
    ]


def _prompts(wanted: Any, suffix: tuple[int, ...], n_vocab: int | None = None) -> torch.Tensor:
    return ids_with(suffix, n_vocab if n_vocab is not None else wanted.model.dims.vocab, _N_TOKENS, seed=0)


def difference_of(case: str, actual: torch.Tensor, wanted: torch.Tensor) -> Difference:
    """The difference of logits [..., vocab] from the expected ones."""
    scale = max(1.0, float(wanted.abs().max()))
    chosen = wanted.gather(-1, actual.argmax(-1, keepdim=True)).squeeze(-1)
    same = float((wanted.amax(-1) - chosen <= _TIE * scale).float().mean())
    return Difference(case, float((actual - wanted).abs().max()) / scale, same)
