"""Models as transformers computes them: for architectures that no plugin describes, and to compare ours with.

Only classes of the installed transformers are used; code that a checkpoint carries is never run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.decoder.packed import Packed
from llmkit.errors import InputError, RequirementError, SpecError, listing

if TYPE_CHECKING:
    import torch

__all__ = ["TransformersDecoder", "load_transformers", "quiet_transformers", "transformers_model"]

_PADDED_SHARE = 0.8  # sequences in one padded batch are at least this long, relative to the longest
_GROWING = ("dynamic", "longrope")  # rotary frequencies that follow the longest sequence of a batch


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

    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    made = None
    with quiet_transformers():
        if config.get("model_type") in known:
            described = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
            stated = [getattr(transformers, n, None) for n in config.get("architectures") or ()]
            auto = transformers.AutoModelForCausalLM._model_mapping.get(type(described), None)
            usable = [c for c in (*stated, auto) if c is not None and c.can_generate()]
            made = usable[0] if usable and not described.is_encoder_decoder else None
        if made is None:
            name = ", ".join(config.get("architectures") or ()) or f"model_type {config.get('model_type')}"
            raise RequirementError(
                f"{label}: transformers {transformers.__version__} has no decoder for {name}",
                hint="code that a checkpoint carries is never run; a newer transformers may know it",
            )
        # As it reads files: in memory it has other names for some tensors.
        model, report = made.from_pretrained(
            None,
            config=described,
            state_dict=dict(weights),
            dtype=dtype,
            output_loading_info=True,
            **({"attn_implementation": attention} if attention else {}),
        )
    tied = model._tied_weights_keys or ()
    left = [m for m in report["missing_keys"] if m not in tied]
    if left or report["mismatched_keys"]:
        odd = [str(k) for k in (*left, *report["mismatched_keys"])]
        raise SpecError(f"{label}: transformers' {made.__name__} needs other tensors: {listing(odd, 3)}")
    if report["unexpected_keys"]:
        raise SpecError(f"{label}: transformers' {made.__name__} has no {listing(list(report['unexpected_keys']), 3)}")
    return model.eval()


class _Past:
    """What transformers remembers of a batch of sequences."""

    def __init__(self) -> None:
        self.ids: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        self.kept: Any = None
        self.rows: list[_Past] = []


class TransformersDecoder:
    """A model of transformers behind the interface of llmkit's decoder; no prefix is shared.

    Its "hidden states" are logits already: what a family does after its output matrix is the family's own.
    """

    backend = "transformers"
    exact_sharing_limit: int | None = 0
    rebuilt_past: int | None = None

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model.to(device)
        self.device = device
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes and "attention_mask" in takes
        self._n_vocab = int(model.get_input_embeddings().weight.shape[0])
        inner = model.config.get_text_config()
        self.context: int | None = getattr(inner, "max_position_embeddings", None)
        rope = getattr(inner, "rope_parameters", None) or getattr(inner, "rope_scaling", None) or {}
        is_growing = isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in _GROWING
        self._share = 1.0 if is_growing else _PADDED_SHARE

    def new_cache(self, capacity: int = 0) -> _Past:
        return _Past()

    def __call__(self, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, vocab] in float32."""
        return self.logits(self.hidden(input_ids, cache, mask))

    def next_logits(self, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 logits [B, vocab] after the last of the tokens."""
        return self.logits(self.hidden(input_ids, cache, mask)[:, -1])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float()

    def hidden(self, input_ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        ids = torch.as_tensor(input_ids, device=self.device)
        if ids.dim() != 2 or ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= self._n_vocab:
            raise InputError(
                f"token ids must be [B, S] in 0..{self._n_vocab - 1}, found shape {list(ids.shape)}",
                hint="the tokenizer must be the one that belongs to this checkpoint",
            )
        with torch.inference_mode(), quiet_transformers():
            if isinstance(cache, Packed):
                return self._side_by_side(ids[0], cache)[None]
            if cache is None:
                cache = _Past()
            is_padded = mask is not None and not bool(mask.all())
            if cache.rows or (is_padded and not self._takes_positions):
                return self._one_by_one(ids, cache, mask)
            return self._continued(ids, cache, mask)

    def _side_by_side(self, ids: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Sequences that lie side by side in one row, in batches padded on the right, where nothing looks."""
        import torch

        if packed.prefix is not None:
            raise InputError("transformers' models share no prefix")
        pieces = list(ids.split(list(packed.lengths)))
        order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))
        found: list[torch.Tensor] = [ids] * len(pieces)
        while order:
            longest = len(pieces[order[0]])
            group = [i for i in order if len(pieces[i]) >= self._share * longest]
            order = order[len(group) :]
            batch = ids.new_zeros(len(group), longest)
            for row, i in enumerate(group):
                batch[row, : len(pieces[i])] = pieces[i]
            logits = self._model(input_ids=batch, use_cache=False).logits
            for row, i in enumerate(group):
                found[i] = logits[row, : len(pieces[i])]
        return torch.cat(found)

    def _continued(self, ids: torch.Tensor, past: _Past, mask: torch.Tensor | None) -> torch.Tensor:
        """One batch of sequences of one length, padded on the left where the mask says so."""
        import torch

        new = torch.ones_like(ids)
        if past.ids is None:
            past.ids, past.mask = ids, new if mask is None else mask.to(self.device)
        else:
            past.ids, past.mask = torch.cat([past.ids, ids], 1), torch.cat([past.mask, new], 1)  # type: ignore[list-item]
        given = ids if past.kept is not None else past.ids  # all of it, where the model keeps no keys
        more: dict[str, Any] = {"past_key_values": past.kept} if past.kept is not None else {}
        if self._takes_positions and past.mask is not None:
            positions = (past.mask.cumsum(-1) - 1).clamp_min(0)
            more |= {"attention_mask": past.mask, "position_ids": positions[:, -given.shape[1] :]}
        made = self._model(input_ids=given, use_cache=True, **more)
        past.kept = getattr(made, "past_key_values", None)
        logits: torch.Tensor = made.logits[:, -ids.shape[1] :]
        return logits

    def _one_by_one(self, ids: torch.Tensor, past: _Past, mask: torch.Tensor | None) -> torch.Tensor:
        """Each row without its padding, for a model that would count it; the logits of padding are zeros."""
        import torch

        if not past.rows:
            past.rows = [_Past() for _ in ids]
        found = []
        for i, row in enumerate(ids):
            real = row if mask is None else row[mask[i, -len(row) :].to(row.device) != 0]
            logits = self._continued(real[None], past.rows[i], None)[0]
            found.append(torch.cat([logits.new_zeros(len(row) - len(real), logits.shape[-1]), logits]))
        return torch.stack(found)


def load_transformers(ckpt: Checkpoint, dtype: torch.dtype, device: torch.device) -> TransformersDecoder:
    """Transformers' model of a checkpoint's tensors; quantized ones are dequantized first."""
    from llmkit.quantization.reading import dequantized

    ckpt = dequantized(ckpt)
    weights = {name: lazy.load() for name, lazy in ckpt.tensors.items()}
    return TransformersDecoder(transformers_model(ckpt.config, weights, ckpt.label, dtype=dtype), device)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars, and what it says about old configs."""
    import transformers

    logs = transformers.utils.logging
    is_shown, verbosity = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if is_shown:
            logs.enable_progress_bar()
