"""Quantized checkpoints as float ones: lazy, sliceable by rows, with the names and the config of the float model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmkit.architecture import registry
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.contents import quantization_of
from llmkit.errors import RequirementError, SpecError
from llmkit.formats.quantized import BLOCKS, CONFIG_KEYS, config_entry
from llmkit.quantization import rtn
from llmkit.quantization.packing import n_words, unpack
from llmkit.quantization.schemes import METHOD, PACKED_FORMAT, Scheme
from llmkit.tensors.codes import Codes, Decoded
from llmkit.tensors.lazy import Apply, Lazy, Read
from llmkit.tensors.rearrange import take_columns, viewed
from llmkit.tensors.spec import DType, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["dequantized", "describe", "is_quantized", "kv_cache_scheme", "model_dtype", "refuse_unread"]

_INT_FORMATS = ("int-quantized", "naive-quantized")
_PARAMETERS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
    "input_zero_point", "output_scale", "output_zero_point",
)  # fmt: skip
_OF_CACHE = tuple(f".{part}_{what}" for part in "qkv" for what in ("scale", "zero_point"))
_BLOCK_NBYTES = 2**20


def model_dtype(config: Mapping[str, Any]) -> DType | None:
    """The dtype that config.json gives the model (`dtype`, before transformers 5 `torch_dtype`), if it is a float."""
    for key in ("dtype", "torch_dtype"):
        text = config.get(key)
        if isinstance(text, str) and text != "auto":
            dtype = DType.parse(text)
            return dtype if dtype.is_float else None
    return None


def is_quantized(ckpt: Checkpoint) -> bool:
    """Whether the tensors are not the weights but what quantization made of them, by whatever method."""
    found = quantization_of(ckpt)
    if ckpt.layout == "onnx":
        return False  # its tensors are the graph's
    return found is not None and found.method != BLOCKS  # a GGUF opens as the floats that its blocks stand for


def describe(ckpt: Checkpoint) -> str | None:
    """The quantization in a few words (`int4 group 64 symmetric, compressed-tensors`); None for a float model."""
    found = quantization_of(ckpt)
    return None if found is None else found.words if found.method == BLOCKS else str(found)


def kv_cache_scheme(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How keys and values are to be cached, as compressed-tensors says it in config.json; None for in floats."""
    scheme = (config_entry(config) or {}).get("kv_cache_scheme")
    return scheme if isinstance(scheme, Mapping) else None


def dequantized(ckpt: Checkpoint, *, dtype: DType | None = None) -> Checkpoint:
    """The float view of a compressed-tensors checkpoint; a float checkpoint is returned as it is.

    Each weight is what compressed-tensors' own decompression gives at that dtype, bit for bit. No data is read until a
    tensor is loaded.

    Args:
        dtype: of the restored weights; default: the model's (config.json), or that of the scales.

    Raises:
        RequirementError: another method than compressed-tensors, or a form of it that is not read.
        SpecError: tensors of a quantized layer are missing or do not fit together.
    """
    if not is_quantized(ckpt):
        return ckpt
    refuse_unread(ckpt)
    entry = config_entry(ckpt.config) or {}
    groups = _groups(entry)
    wanted = dtype or model_dtype(ckpt.config)
    config = {k: v for k, v in ckpt.config.items() if k not in CONFIG_KEYS}
    shapes = _logical_shapes(config)
    modules = [k.removesuffix(".weight_scale") for k in ckpt.tensors if k.endswith(".weight_scale")]
    consumed = {f"{m}.{p}" for m in modules for p in _PARAMETERS}
    if kv_cache_scheme(ckpt.config) is not None:
        consumed |= {name for name in ckpt.tensors if name.endswith(_OF_CACHE)}
    tensors = {name: lazy for name, lazy in ckpt.tensors.items() if name not in consumed}
    for module in modules:
        group = _group_of(module, groups)
        layout = str(group.get("format") or entry.get("format"))
        try:
            scheme = Scheme.from_weights(group.get("weights") or {})
        except SpecError as error:
            raise RequirementError(f"{ckpt.label}: {module}: {error.message}", hint=_REMEDY) from error
        parts = {p: ckpt.tensors[f"{module}.{p}"] for p in _PARAMETERS if f"{module}.{p}" in ckpt.tensors}
        if f"{module}.weight" in ckpt.tensors:
            parts["weight"] = ckpt.tensors[f"{module}.weight"]
        out_dtype = wanted or parts["weight_scale"].dtype
        make = _from_packed if layout == PACKED_FORMAT else _from_int8
        tensors[f"{module}.weight"] = make(module, parts, scheme, out_dtype, shapes.get(f"{module}.weight"))
    left = [k for k in tensors if k.endswith((".weight_packed", ".weight_shape"))]
    if left:
        raise SpecError(f"{ckpt.label}: {left[0]} has no weight_scale beside it")
    return ckpt.derive(
        tensors=tensors, config=config, step={"transform": "dequantize"}, warnings=_activation_warnings(entry, groups)
    )


_REMEDY = "start from the float checkpoint it was made from, or load it with the library that wrote it and save floats"


def _groups(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = entry.get("config_groups")
    return [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []


def refuse_unread(ckpt: Checkpoint) -> None:
    """Refuse a quantization that `dequantized` does not read; nothing for a float checkpoint.

    Raises:
        RequirementError, SpecError: as of `dequantized`.
    """
    found, label, entry = quantization_of(ckpt), ckpt.label, config_entry(ckpt.config) or {}
    if found is None or not is_quantized(ckpt):
        return
    if found.method != METHOD:
        message = f"{label} is quantized ({found}), which is not read; expected {METHOD}"
        if found.n_weights:
            raise RequirementError(f"{message} (seen: {found.seen})", hint=_REMEDY)
        raise RequirementError(
            f"{message}. Only {found.seen} says so, no tensor is stored so",
            hint=f"where its weights are floats, remove quantization_config from config.json; else {_REMEDY}",
        )
    if not entry:
        raise RequirementError(
            f"{label} is quantized ({found}; seen: {found.seen}), and no config.json says by which scheme",
            hint="put the config.json of this model, with its quantization_config, beside the weights",
        )
    formats = [str(g.get("format") or entry.get("format")) for g in _groups(entry)]
    for layout in formats:
        if layout not in (PACKED_FORMAT, *_INT_FORMATS):
            raise RequirementError(
                f"{label}: the {METHOD} format {layout!r} is not read; expected {PACKED_FORMAT} or {_INT_FORMATS[0]}",
                hint=_REMEDY,
            )
    if entry.get("transform_config"):
        raise RequirementError(
            f"{label}: its weights were rotated (transform_config), which is not undone", hint=_REMEDY
        )
    if not formats and not entry.get("kv_cache_scheme"):
        raise SpecError(f"{label}: quantization_config has no config_groups")


def _activation_warnings(entry: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [k for g in groups for k in ("input_activations", "output_activations") if g.get(k)]
    found += ["kv_cache_scheme"] if entry.get("kv_cache_scheme") else []
    if not found:
        return []
    names = ", ".join(dict.fromkeys(found))
    return [
        f"the model was meant to run with quantized {names}; here only its weights are: expect slightly other scores"
    ]


def _group_of(module: str, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The config group of a module: exact names win over patterns, patterns over classes (`Linear`)."""
    named = [(group.get("targets"), group) for group in groups]
    targets = [(str(target), group) for listed, group in named if isinstance(listed, list) for target in listed]
    exact = [group for target, group in targets if target == module]
    try:
        patterns = [group for target, group in targets if target.startswith("re:") and re.match(target[3:], module)]
    except re.error as error:
        raise SpecError(f"quantization_config: a target is no regular expression: {error}") from error
    classes = [group for target, group in targets if target.isidentifier()]
    for group in (*exact, *patterns, *classes):
        return group
    raise SpecError(f"{module} is quantized, but no config group has it as a target")


def _logical_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    architecture = registry.find(config)
    if architecture is None:
        return {}
    return {name: slot.shape for name, slot in architecture.bind(config).tensors().items()}


def _need(module: str, parts: Mapping[str, Lazy], name: str) -> Lazy:
    if name not in parts:
        raise SpecError(f"{module}: {name} is missing; found {', '.join(parts)}")
    return parts[name]


def _from_packed(
    module: str, parts: Mapping[str, Lazy], scheme: Scheme, dtype: DType, shape: tuple[int, ...] | None
) -> Lazy:
    packed, scale = _need(module, parts, "weight_packed"), _need(module, parts, "weight_scale")
    n_out = packed.spec.n_rows
    n_in = _n_columns(module, parts, scheme, shape)
    expected = TensorSpec(DType.I32, (n_out, n_words(n_in, scheme.bits)))
    if packed.spec != expected:
        raise SpecError(f"{module}.weight_packed is {packed.spec}; expected {expected} for {n_in} columns, {scheme}")
    zeros = None
    if not scheme.is_symmetric:
        zeros = _need(module, parts, "weight_zero_point")
        want = TensorSpec(DType.I32, (n_words(n_out, scheme.bits), scheme.n_groups(n_in)))
        if zeros.spec != want:
            raise SpecError(f"{module}.weight_zero_point is {zeros.spec}; expected {want}")

    def unpack_rows(words: torch.Tensor) -> torch.Tensor:
        return unpack(words, scheme.bits, n_in)

    def unpack_zeros(words: torch.Tensor, n_rows: int) -> torch.Tensor:
        return unpack(words, scheme.bits, n_rows, dim=0)

    return _node(module, parts, scheme, dtype, packed, scale, zeros, (n_out, n_in), unpack_rows, unpack_zeros)


def _from_int8(
    module: str, parts: Mapping[str, Lazy], scheme: Scheme, dtype: DType, shape: tuple[int, ...] | None
) -> Lazy:
    weight, scale = _need(module, parts, "weight"), _need(module, parts, "weight_scale")
    if weight.dtype is not DType.I8 or len(weight.shape) != 2:
        raise SpecError(f"{module}.weight is {weight.spec}; expected a matrix of I8")
    zeros = None if scheme.is_symmetric else _need(module, parts, "weight_zero_point")
    n_out, n_in = weight.shape
    if zeros is not None and zeros.spec != TensorSpec(DType.I8, (n_out, scheme.n_groups(n_in))):
        raise SpecError(f"{module}.weight_zero_point is {zeros.spec}; expected I8[{n_out}, {scheme.n_groups(n_in)}]")
    return _node(module, parts, scheme, dtype, weight, scale, zeros, (n_out, n_in), lambda q: q, lambda z, n: z)


def _n_columns(module: str, parts: Mapping[str, Lazy], scheme: Scheme, shape: tuple[int, ...] | None) -> int:
    """Columns of the float weight. Words may be padded, so a row of words alone does not tell."""
    n = parts["weight_packed"].shape[-1]
    if scheme.group_size is not None:
        return parts["weight_scale"].shape[-1] * scheme.group_size
    if shape is not None and len(shape) == 2 and n_words(shape[1], scheme.bits) == n:
        return shape[1]
    stored = parts.get("weight_shape")
    if stored is not None and isinstance(stored.node, Read):  # two numbers, no data to speak of
        return int(stored.load()[-1])
    return n * scheme.per_word


def _node(
    module: str,
    parts: Mapping[str, Lazy],
    scheme: Scheme,
    dtype: DType,
    values: Lazy,
    scale: Lazy,
    zeros: Lazy | None,
    shape: tuple[int, int],
    unpack_rows: Callable[[torch.Tensor], torch.Tensor],
    unpack_zeros: Callable[[torch.Tensor, int], torch.Tensor],
) -> Lazy:
    n_out, n_in = shape
    n_groups = scheme.n_groups(n_in)
    if scale.shape not in ((n_out, n_groups), (n_out,)) or not scale.dtype.is_float:
        raise SpecError(f"{module}.weight_scale is {scale.spec}; expected floats [{n_out}, {n_groups}]")
    inputs, input_rows = [values, scale], [1, 1]
    if zeros is not None:
        inputs.append(zeros)
        input_rows.append(scheme.per_word if zeros.dtype is DType.I32 else 1)
    order = parts.get("weight_g_idx")
    if order is not None:
        inputs.append(order)
        input_rows.append(0)

    def fn(*args: torch.Tensor) -> torch.Tensor:
        rest = list(args[2:])
        zero = unpack_zeros(rest.pop(0), args[0].shape[0]) if zeros is not None else None
        index = rest.pop(0).long() if order is not None else None
        scales = args[1].reshape(-1, n_groups).to(dtype.torch)
        return _dequantize_rows(args[0], scales, zero, index, unpack_rows, n_in)

    spec = TensorSpec(dtype, shape)
    node = Decoded("dequantize", inputs, spec, fn, scheme.attrs(), input_rows=input_rows, scratch=1.0)
    node.source = f"{scheme}, columns in another order" if order is not None else str(scheme)
    if order is None:
        node.codes = _codes(scheme, values, scale, zeros, n_in)
    return node.output()


def _codes(scheme: Scheme, values: Lazy, scale: Lazy, zeros: Lazy | None, n_in: int) -> Codes:
    """What the matrix is made of. Packed words are codes as they lie in the file, byte by byte."""
    n_out, n_groups = values.spec.n_rows, scheme.n_groups(n_in)
    if values.dtype is DType.I32:
        codes = take_columns(viewed(values, DType.U8, (n_out, 4 * values.shape[1])), 0, -(-n_in * scheme.bits // 8))
    else:
        codes = Apply("offset", [values], values.spec.with_dtype(DType.U8), lambda q: _unsigned(q, 8)).output()
    found = None
    if zeros is not None:

        def of_rows(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            if stored.dtype.itemsize == 4:
                stored = unpack(stored, scheme.bits, len(scales), dim=0)
            return _unsigned(stored, scheme.bits)

        per = scheme.per_word if zeros.dtype is DType.I32 else 1
        spec = TensorSpec(DType.U8, (n_out, n_groups))
        found = Apply("zero points", [zeros, scale], spec, of_rows, scheme.attrs(), input_rows=[per, 1]).output()
    scales = viewed(scale, scale.dtype, (n_out, n_groups))
    return Codes(scheme.bits, n_in // n_groups, n_in, codes, scales, found, str(scheme))


def _unsigned(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes (int8) plus 2^(bits-1), as uint8."""
    import torch

    return (q.view(torch.uint8) + (1 << (bits - 1))) & ((1 << bits) - 1)


def _dequantize_rows(
    stored: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    index: torch.Tensor | None,
    unpack_rows: Callable[[torch.Tensor], torch.Tensor],
    n_in: int,
) -> torch.Tensor:
    """Weights in the dtype of `scale`, a block of rows at a time. `index` is the group of each column (act-order)."""
    import torch

    n_out, n_groups = scale.shape
    weight = torch.empty((n_out, n_in), dtype=scale.dtype)
    step = max(_BLOCK_NBYTES // (4 * max(n_in, 1)), 1)
    for start in range(0, n_out, step):
        rows = slice(start, min(start + step, n_out))
        q = unpack_rows(stored[rows])
        s, z = scale[rows], None if zero is None else zero[rows]
        if index is None:
            weight[rows] = rtn.dequantize(q.view(len(q), n_groups, -1), s, z).flatten(1)
        else:
            s, z = s[:, index], None if z is None else z[:, index]
            weight[rows] = rtn.dequantize(q.unsqueeze(-1), s, z).squeeze(-1)
    return weight
