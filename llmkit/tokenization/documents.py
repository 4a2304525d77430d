"""The parts of a tokenizer.json that is made from another tokenizer, as the tokenizers library lays them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmkit.tokenization.sentencepiece_model import SPACE

Step = Mapping[str, Any]


def document(
    model: Mapping[str, Any],
    *,
    decoder: Step,
    normalizer: Step | None = None,
    pre_tokenizer: Step | None = None,
    post_processor: Step | None = None,
    added: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The whole file."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added), "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model,
    }  # fmt: skip


def bpe_model(
    vocab: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    *,
    unknown: str | None = None,
    fuses_unknown: bool = False,
    has_byte_fallback: bool = False,
    ignores_merges: bool = False,
) -> dict[str, Any]:
    """A BPE model; `ignores_merges` takes a word that is a token whole."""
    return {
        "type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "unk_token": unknown, "fuse_unk": fuses_unknown, "byte_fallback": has_byte_fallback,
        "ignore_merges": ignores_merges, "vocab": dict(vocab), "merges": [list(pair) for pair in merges],
    }  # fmt: skip


def sentencepiece_steps(*, adds_space: bool, before: Iterable[Step] = ()) -> tuple[Step, Step]:
    """SentencePiece's normalizer and decoder: spaces as ▁, one of them put before the text where `adds_space`.

    Args:
        before: normalizers that come first.
    """
    first: list[Step] = [{"type": "Prepend", "prepend": SPACE}] if adds_space else []
    marked = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    last: list[Step] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    spaced = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return (
        {"type": "Sequence", "normalizers": [*before, *first, marked]},
        {"type": "Sequence", "decoders": [spaced, {"type": "ByteFallback"}, {"type": "Fuse"}, *last]},
    )


def template_processing(prefix: Sequence[tuple[str, int]], suffix: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """The post-processor that puts tokens (text, id) around every text; None for none."""
    if not prefix and not suffix:
        return None

    def special(tokens: Sequence[tuple[str, int]], type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": text, "type_id": type_id}} for text, _ in tokens]

    def one(sequence: str, type_id: int) -> list[dict[str, Any]]:
        middle = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [*special(prefix, type_id), middle, *special(suffix, type_id)]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in (*prefix, *suffix)},
    }
