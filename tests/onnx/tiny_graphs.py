"""The graph of a family's tiny model on ONNX Runtime, beside its torch decoder."""

from __future__ import annotations

from llmkit.architecture.kinds import NoPositions, Rope
from llmkit.architecture.latent import LatentAttention
from llmkit.architecture.layer_inputs import SharedKeys
from llmkit.architecture.registry import default_registry
from llmkit.decoder import load_decoder
from llmkit.decoder.contract import random_checkpoint
from llmkit.onnx.contract import decoder_of, initializer_bytes
from llmkit.onnx.model import build_graph
from llmkit.onnx.opening import load_onnx
from llmkit.onnx.quantized_weights import choose_grids, restored
from llmkit.tensors.spec import DType

PLUGINS = {p.name: default_registry().load(p) for p in default_registry().plugins if p.is_builtin}
CASES = [(name, variant) for name, a in PLUGINS.items() for variant in (None, *a.variants)]


def is_refused(name, attention):
    """Whether an op cannot compute a tiny model: head size, shared keys, capped, biased or cut scores."""
    model = PLUGINS[name].bind(PLUGINS[name].tiny_config())
    kind = getattr(model.block, "attention", None)
    if attention == "attention":
        return False
    kinds = [getattr(block, "attention", None) for block in model.blocks]
    if any(
        isinstance(each, LatentAttention) or (attention == "flash" and isinstance(each, SharedKeys)) for each in kinds
    ):
        return True
    if kind is None:
        return False
    is_grouped = model.dims.heads != model.dims.kv_heads or getattr(kind, "softcap", None) is not None
    is_cut = any(getattr(each, "chunk", None) is not None for each in kinds)
    is_biased = attention == "flash" and (is_cut or not isinstance(model.block.position, Rope | NoPositions))
    return bool(is_grouped if attention == "mha" else model.dims.head_dim % 8 or is_biased)


def made(name, variant=None, attention="attention", check=False, dtype="FLOAT", changes=None, seed=0):
    """The decoder on ONNX Runtime and the torch decoder, with the ids that prompts of the family end with.

    `changes` are keys of the tiny config that differ.
    """
    import onnx

    architecture = PLUGINS[name]
    config = architecture.tiny_config(variant) | (changes or {})
    ckpt = random_checkpoint(architecture, config, seed=seed)
    model = architecture.bind(config)
    graph = build_graph(model, ckpt.tensors, initializer_bytes, attention=attention, dtype=dtype)
    if check:
        onnx.checker.check_model(graph, full_check=False)
    return (
        decoder_of(graph, model),
        load_decoder(ckpt, architecture=architecture),
        architecture.prompt_suffix_of(config),
    )


def made_on_grids(name, precision, variant=None, attention="attention", dtype="FLOAT"):
    """The same for matrices on integer grids: the torch decoder has the floats that the integers stand for."""
    architecture = PLUGINS[name]
    config = architecture.tiny_config(variant)
    ckpt, model = random_checkpoint(architecture, config), architecture.bind(config)
    scale_dtype = {"FLOAT": DType.F32, "FLOAT16": DType.F16}[dtype]
    grids, _ = choose_grids(ckpt, model, precision, scale_dtype=scale_dtype, provider="cpu")
    graph = build_graph(model, ckpt.tensors, initializer_bytes, attention=attention, dtype=dtype, grids=grids)
    wanted = load_decoder(ckpt.derive(tensors=restored(ckpt.tensors, model, grids)), architecture=architecture)
    return decoder_of(graph, model), wanted, architecture.prompt_suffix_of(config)


def exported_decoders(folder, reference):
    """An exported folder at accuracy level 0, and the torch decoder of a checkpoint."""
    return load_onnx(folder, exact=True), load_decoder(reference)
