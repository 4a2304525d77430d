"""`consolidated.safetensors` and params.json: Meta's names and order of rotary pairs, in safetensors, with other keys.

params.json states the size of the heads and of the MLP, which Meta's leaves to formulas. Larger models are
`consolidated-00001-of-00003.safetensors` and so on, with an index that nothing here needs.

Source: transformers' convert_mistral_weights_to_hf.py.
"""

from __future__ import annotations

import re

from llmkit.errors import InputError, RequirementError, listing
from llmkit.formats.folder import read_file, refuse_gaps
from llmkit.layouts.candidate import Candidate
from llmkit.layouts.described import decoder_config, with_config_beside
from llmkit.layouts.layout import Layout, OpenedLayout, commonest_dtype, to_hf
from llmkit.layouts.meta import SPELLING
from llmkit.layouts.params import PARAMS, number, whole
from llmkit.tensors.lazy import Lazy

NAME = "consolidated"
_FILE = re.compile(r"consolidated(-\d+-of-\d+)?\.safetensors")
_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")
_OTHERS = ("norm_eps", "rope_theta", "max_seq_len", "max_position_embeddings", "tied_embeddings", "model_parallel",
           "max_batch_size", "multiple_of", "ffn_dim_multiplier")  # fmt: skip
_NEUTRAL = {"sliding_window": None, "_sliding_window": None, "use_biases": False, "causal": True, "moe": None,
            "model_type": "transformer", "quantization": None, "yarn": None, "lora": None,
            "use_scaled_rope": False}  # fmt: skip
_CONTEXT = 32768  # of the first releases in this layout


def find(candidate: Candidate) -> OpenedLayout | None:
    """What a folder of consolidated safetensors holds, or a file of such a folder; None for anything else.

    Raises:
        InputError: params.json is missing, or it contradicts the tensors.
        RequirementError: params.json asks for what a plain decoder does not compute, named.
    """
    folder, files = candidate.folder, candidate.own_files(_FILE)
    if not files:
        return None
    where = str(folder / PARAMS)
    if PARAMS not in candidate.names:
        raise InputError(
            f"{folder} holds {listing(p.name for p in files)} and no {PARAMS}, which says what model it is",
            hint=f"put the {PARAMS} of this model into {folder}",
        )
    params = candidate.json(PARAMS)
    odd = [k for k, v in params.items() if k not in (*_SIZES, *_OTHERS) and v != _NEUTRAL.get(k, f"no {k}")]
    if odd:
        raise RequirementError(
            f"{where}: {listing(odd)} {'are' if len(odd) > 1 else 'is'} not read, only plain decoders are",
            hint="take the folder as transformers publishes it, with config.json and model.safetensors",
        )
    refuse_gaps(folder, files)
    tensors: dict[str, Lazy] = {name: lazy for path in files for name, lazy in read_file(path).items()}
    sizes = {key: whole(where, params, key) for key in _SIZES if key in params or key in ("dim", "n_layers", "n_heads")}
    gate, embed = tensors.get("layers.0.feed_forward.w1.weight"), tensors.get("tok_embeddings.weight")
    if gate is None or embed is None:
        raise InputError(f"{files[0]}: no tok_embeddings.weight or no layers.0.feed_forward.w1.weight: not this layout")
    context = params.get("max_position_embeddings") or params.get("max_seq_len")
    config = decoder_config(
        hidden=sizes["dim"],
        ffn=sizes.get("hidden_dim", gate.spec.n_rows),
        layers=sizes["n_layers"],
        heads=sizes["n_heads"],
        kv_heads=sizes.get("n_kv_heads"),
        head_dim=sizes.get("head_dim"),
        vocab=sizes.get("vocab_size", embed.spec.n_rows),
        eps=number(where, params, "norm_eps", 1e-5),
        theta=number(where, params, "rope_theta", 10000.0),
        context=context if isinstance(context, int) else _CONTEXT,
        is_tied=params.get("tied_embeddings") is True and "output.weight" not in tensors,
        dtype=commonest_dtype(tensors),
    )
    notes = [f"read from {listing(p.name for p in files)} and {PARAMS}"]
    beside = with_config_beside(candidate, str(folder), config)
    if beside is None and not isinstance(context, int):
        notes.append(f"{PARAMS} does not state the context: {_CONTEXT} tokens assumed")
    config = beside or config
    return OpenedLayout(NAME, to_hf(str(folder), tensors, config, SPELLING), config, own=(PARAMS,), notes=tuple(notes))


LAYOUT = Layout(NAME, find, has_own_format=True)
