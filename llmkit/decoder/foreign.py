"""Models as transformers computes them: for architectures that no plugin describes, and to compare ours with.

Only classes of the installed transformers are used; code that a checkpoint carries is never run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.class_config import class_config, first_line
from llmkit.checkpoint.classification import require_model
from llmkit.checkpoint.quantized import dequantized
from llmkit.decoder.language_model import Predictor, token_ids
from llmkit.decoder.packed import Packed
from llmkit.errors import InputError, RequirementError, SpecError, listing
from llmkit.lazy_imports import torch

_PADDED_SHARE = 0.8  # sequences in one padded batch are at least this long, relative to the longest
_GROWING = ("dynamic", "longrope")  # rotary frequencies that follow the longest sequence of a batch
# What a cached step may differ by from the whole sequence, relative to the largest logit: rounding, no lost state.
_STEP_TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
_LOOKS_AHEAD = (
    "{} is no causal model with this config: its logits for a token see the tokens behind it, so scores know the answer"
)


def transformers_model(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    label: str,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
) -> Any:
    """Transformers' own model of a config, with these weights.

    Raises:
        RequirementError: the installed transformers has no class for it.
        SpecError: its names are not those of the weights.
    """
    import transformers

    classes = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    model_class = None
    with quiet_transformers():
        if registry.model_type_of(config) in classes:
            described = class_config(config, label)
            stated = [getattr(transformers, n, None) for n in registry.claims(config)]
            auto = transformers.AutoModelForCausalLM._model_mapping.get(type(described), None)
            usable = [c for c in (*stated, auto) if c is not None and c.can_generate()]
            model_class = usable[0] if usable and not described.is_encoder_decoder else None
        if model_class is None:
            name = ", ".join(config.get("architectures") or ()) or f"model_type {config.get('model_type')}"
            raise RequirementError(
                f"{label}: transformers {transformers.__version__} has no decoder for {name}",
                hint="code that a checkpoint carries is never run; a newer transformers may know it",
            )
        # As it reads files: in memory it has other names for some tensors.
        try:
            model, report = model_class.from_pretrained(
                None,
                config=described,
                state_dict=dict(weights),
                dtype=dtype,
                output_loading_info=True,
                **({"attn_implementation": attention} if attention else {}),
            )
        except (ArithmeticError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            raise SpecError(
                f"{label}: transformers' {model_class.__name__} cannot be made of config.json: {first_line(error)}",
                hint="config.json must be the one these weights were saved with",
            ) from error
    tied = model._tied_weights_keys or ()
    left = [m for m in report["missing_keys"] if m not in tied]
    if left or report["mismatched_keys"]:
        odd = [str(k) for k in (*left, *report["mismatched_keys"])]
        raise SpecError(f"{label}: transformers' {model_class.__name__} needs other tensors: {listing(odd, 3)}")
    if report["unexpected_keys"]:
        raise SpecError(
            f"{label}: transformers' {model_class.__name__} has no {listing(list(report['unexpected_keys']), 3)}"
        )
    return model.eval()


class _Past:
    """What transformers remembers of a batch of sequences.

    Attributes:
        kept: argument of `forward` -> what the last call returned under that name: keys and values, or a state.
        is_lost: a step with what is kept gave other logits than the whole sequence, which is computed from now on.
    """

    def __init__(self) -> None:
        self.ids: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.kept: dict[str, Any] = {}
        self.is_lost = False
        self.rows: list[_Past] = []


class TransformersDecoder(Predictor):
    """A model of transformers behind the interface of llmkit's decoder; no prefix is shared.

    Its "hidden states" are logits already: what a family does after its output matrix is the family's own.

    What a model remembers has another name from family to family (`past_key_values`, `cache`, `cache_params`, `state`);
    an unknown name would vanish in `**kwargs`. It is handed back under the names that both `forward` and its output
    have, and the first step of each length is compared with the whole sequence: where it differs, every step computes
    the whole.
    """

    backend = "transformers"
    exact_sharing_limit: int | None = 0
    recompute_beyond: int | None = None

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model.to(device)
        self.device = device
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        inner = model.config.get_text_config()
        kinds = {str(kind) for kind in getattr(inner, "layer_types", None) or ()}
        self._is_stateful = (
            bool(getattr(model, "_is_stateful", False))
            or not self._takes & {"cache", "past_key_values"}
            or any("attention" not in kind or "linear" in kind for kind in kinds)
        )
        # A recurrence would take padding in.
        self._takes_padding = self._takes >= {"position_ids", "attention_mask"} and not self._is_stateful
        self._checked: set[int] = set()  # numbers of tokens in a step that was compared with the whole sequence
        self._n_vocab = int(model.get_input_embeddings().weight.shape[0])
        self.context: int | None = getattr(inner, "max_position_embeddings", None)
        rope = getattr(inner, "rope_parameters", None) or getattr(inner, "rope_scaling", None) or {}
        is_growing = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in _GROWING
        self._share = 1.0 if is_growing else _PADDED_SHARE

    def looks_ahead(self) -> bool:
        """Whether logits depend on tokens behind them (encoders, `is_causal` false)."""
        last = min(9, self._n_vocab - 1)
        first, second = self(torch.tensor([[1, 2, 3, 4], [1, 2, 3, last]]))[:, :-1]
        return not _agree(first, second)

    def new_cache(self, capacity: int = 0) -> _Past:
        return _Past()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float()

    def hidden(self, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        ids = token_ids(input_ids, self._n_vocab, self.device)
        with torch.inference_mode(), quiet_transformers():
            if isinstance(cache, Packed):
                return self._side_by_side(ids[0], cache)[None]
            if cache is None:
                cache = _Past()
            is_padded = mask is not None and not bool(mask.all())
            if cache.rows or (is_padded and not self._takes_padding):
                return self._one_by_one(ids, cache, mask)
            return self._continued(ids, cache, mask)

    def _side_by_side(self, ids: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Sequences that lie side by side in one row, in batches padded on the right, where nothing looks."""
        if packed.prefix is not None:
            raise InputError("transformers' models share no prefix")
        pieces = list(ids.split(list(packed.lengths)))
        order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))
        results: list[torch.Tensor] = [ids] * len(pieces)
        while order:
            longest = len(pieces[order[0]])
            group = [i for i in order if len(pieces[i]) >= self._share * longest]
            order = order[len(group) :]
            batch = ids.new_zeros(len(group), longest)
            for row, i in enumerate(group):
                batch[row, : len(pieces[i])] = pieces[i]
            logits = self._run(batch, None)
            for row, i in enumerate(group):
                results[i] = logits[row, : len(pieces[i])]
        return torch.cat(results)

    def _continued(self, ids: torch.Tensor, past: _Past, mask: torch.Tensor | None) -> torch.Tensor:
        """One batch of sequences of one length, padded on the left where the mask says so."""
        new = torch.ones_like(ids)
        if past.ids is None:
            past.ids, past.mask = ids, new if mask is None else mask.to(self.device)
        else:
            past.ids, past.mask = torch.cat([past.ids, ids], 1), torch.cat([past.mask, new], 1)  # type: ignore[list-item]
        sequence, n_new = past.ids, ids.shape[1]
        if self._is_stateful and n_new > 1:  # many classes begin their recurrence anew, or fail, at several tokens
            past.kept = {}
        if not past.kept or past.is_lost:
            return self._run(sequence, past)[:, -n_new:]
        step = self._run(ids, past)
        if n_new not in self._checked:
            whole_again = self._run(sequence, None, past.mask)[:, -n_new:]
            if not _agree(step, whole_again):
                past.is_lost, past.kept = True, {}
                return whole_again
            if not self._is_stateful:  # a state may be right after one prompt and wrong after a shorter one
                self._checked.add(n_new)
        return step

    def _run(self, ids: torch.Tensor, past: _Past | None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, vocab] of the last S tokens of a sequence; `past` takes in what the model remembers.

        Args:
            past: None computes without anything remembered, and `mask` is that of the whole sequence then.
        """
        mask = mask if past is None else past.mask
        n_all = ids.shape[1] if mask is None else mask.shape[1]
        keeps = past is not None and not past.is_lost
        more: dict[str, Any] = {"use_cache": keeps, **(past.kept if past is not None else {})}
        more["cache_position"] = torch.arange(n_all - ids.shape[1], n_all, device=self.device)
        if mask is not None and self._takes >= {"position_ids", "attention_mask"}:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            more |= {"attention_mask": mask, "position_ids": positions[:, -ids.shape[1] :]}
        output = self._model(input_ids=ids, **{name: value for name, value in more.items() if name in self._takes})
        if past is not None and keeps:
            past.kept = {name: output[name] for name in output.keys() & self._takes}
        logits: torch.Tensor = output.logits
        return logits

    def _one_by_one(self, ids: torch.Tensor, past: _Past, mask: torch.Tensor | None) -> torch.Tensor:
        """Each row without its padding, for a model that would count it; the logits of padding are zeros."""
        if not past.rows:
            past.rows = [_Past() for _ in ids]
        results = []
        for i, row in enumerate(ids):
            real = row if mask is None else row[mask[i, -len(row) :].to(row.device) != 0]
            logits = self._continued(real[None], past.rows[i], None)[0]
            results.append(torch.cat([logits.new_zeros(len(row) - len(real), logits.shape[-1]), logits]))
        return torch.stack(results)


def _agree(step: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits differ by rounding only; NaN on both sides agrees."""
    scale = max(1.0, float(expected.abs().nan_to_num(0.0).max()))
    name = str(step.dtype).removeprefix("torch.")
    return not bool(((step - expected).abs() > _STEP_TOLERANCE.get(name, 1e-3) * scale).any())


def load_transformers(ckpt: Checkpoint, dtype: torch.dtype, device: torch.device) -> TransformersDecoder:
    """Transformers' model of a checkpoint's tensors; quantized ones are dequantized first."""
    ckpt = dequantized(require_model(ckpt, "the decoder"))
    weights = {name: lazy.load() for name, lazy in ckpt.tensors.items()}
    model = transformers_model(ckpt.config, weights, ckpt.label, dtype=dtype)
    decoder = TransformersDecoder(model, device)
    if decoder.looks_ahead():
        decoder.doubts = (_LOOKS_AHEAD.format(type(model).__name__),)
    return decoder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars, and what it says about old configs and names of arguments."""
    import warnings

    import transformers

    logs = transformers.utils.logging
    is_shown, verbosity = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logs.set_verbosity(verbosity)
        if is_shown:
            logs.enable_progress_bar()
