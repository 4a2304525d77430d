"""Anomalies of a checkpoint that headers, config and tokenizer files show."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.architecture.check import Report
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.classification import quantization_of
from llmkit.checkpoint.quantized import model_dtype
from llmkit.errors import LlmkitError, listing
from llmkit.tensors.lazy import Read
from llmkit.tensors.spec import DType
from llmkit.tokenization.agreement import compare_counts
from llmkit.tokenization.vocabulary import Vocabulary

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")


def find_problems(report: Report | None, vocabulary: Vocabulary | None, n_rows: int | None) -> list[str]:
    """Contradictions: the model cannot be run as it is.

    Args:
        report: of the comparison with the architecture; None when there is none.
        n_rows: rows of the embedding, where known.
    """
    problems = list(report.problems) if report else []
    tokens_without_rows = compare_counts(vocabulary, n_rows).warning
    return problems if tokens_without_rows is None else [*problems, tokens_without_rows]


def find_oddities(
    ckpt: Checkpoint, report: Report | None, vocabulary: Vocabulary | None, n_rows: int | None
) -> list[str]:
    """Anomalies besides the problems, most serious first; arguments as in `find_problems`."""
    oddities = [*ckpt.warnings, *ckpt.notes]
    oddities += _special_ids(ckpt, n_rows)
    oddities += _tokenizer(ckpt, vocabulary, n_rows)
    oddities += _dtypes(ckpt)
    oddities += report.notes if report else ()
    oddities += _strided(ckpt)
    return oddities


def _special_ids(ckpt: Checkpoint, n_rows: int | None) -> Iterator[str]:
    if n_rows is None:
        return
    for file, config in (("config.json", ckpt.config), ("generation_config.json", ckpt.generation_config)):
        for key in _SPECIAL:
            value = config.get(key)
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int) and not isinstance(one, bool) and not 0 <= one < n_rows:
                    yield f"{key} {one} of {file} is no row of the embedding, which has {n_rows}"


def _tokenizer(ckpt: Checkpoint, vocabulary: Vocabulary | None, n_rows: int | None) -> Iterator[str]:
    if vocabulary is None and ckpt.config and ckpt.origin is not None and ckpt.origin.is_dir():
        yield "no tokenizer files: text commands (generate, eval, perplexity) need them"
    padding = compare_counts(vocabulary, n_rows).note
    if padding is not None:
        yield padding


def _dtypes(ckpt: Checkpoint) -> Iterator[str]:
    sizes: dict[DType, int] = {}
    for lazy in ckpt.tensors.values():
        if lazy.dtype.is_float and len(lazy.shape) > 1 and lazy.spec.nbytes:
            sizes[lazy.dtype] = sizes.get(lazy.dtype, 0) + lazy.spec.nbytes
    try:
        stated = model_dtype(ckpt.config)
    except LlmkitError as error:
        yield f"config.json: {error.message}"
        return
    if not sizes or quantization_of(ckpt) is not None:
        return
    main = max(sizes, key=lambda d: sizes[d])
    if len(sizes) > 1:
        shares = ", ".join(f"{d.name} {n / sum(sizes.values()):.0%}" for d, n in sizes.items())
        yield f"matrices of several dtypes: {shares}"
    if stated is DType.F16 and main is DType.BF16:
        yield (
            "stored as bfloat16 though config.json says float16: converted from float16, it has lost 3 bits of "
            "mantissa, and published checksums and XOR deltas will not match"
        )
    elif stated is not None and stated is not main:
        yield f"stored as {main.torch_name}, config.json says {stated.torch_name}"


def _strided(ckpt: Checkpoint) -> Iterator[str]:
    names = [n for n, t in ckpt.tensors.items() if isinstance(t.node, Read) and t.node.strides is not None]
    if names:
        yield f"{len(names)} tensors are stored as views, not row by row: {listing(names, 2)}"
