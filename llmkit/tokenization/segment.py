"""How a tokenizer cuts a single token of another vocabulary: the pieces whose rows a new row can be made from.

The token is cut as it would be inside a text. SentencePiece puts a space before every text, which would add a ▁ that
the token does not have; here nothing is put before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmkit.tokenization.bpe import Priority, apply_bpe, by_rank, by_score, scores_of_merges
from llmkit.tokenization.bundle import TokenizerFiles
from llmkit.tokenization.sentencepiece_model import SPACE


def merge_scores(tokenizer: TokenizerFiles) -> dict[str, float]:
    """Piece -> score of a SentencePiece BPE vocabulary; from the order of its merges where no model file is left."""
    if tokenizer.sp is not None:
        return dict(tokenizer.sp.scores)
    return scores_of_merges(tokenizer.fast.merges) if tokenizer.fast is not None else {}


def merge_priority(tokenizer: TokenizerFiles) -> Priority:
    """Which merge comes next in a BPE tokenizer."""
    if tokenizer.kind == "sentencepiece":
        return by_score(merge_scores(tokenizer))
    return by_rank({pair: i for i, pair in enumerate(tokenizer.fast.merges)} if tokenizer.fast is not None else {})


def segmenter(tokenizer: TokenizerFiles) -> Callable[[str], tuple[int, ...]]:
    """Token, spelled as in the vocabulary (▁ or byte characters) -> ids of its parts."""
    ids = tokenizer.model_ids
    if tokenizer.kind == "unigram" and tokenizer.sp is not None:
        from tokenizers.models import Unigram

        # What no piece covers costs ten less than the rarest one, in SentencePiece as in the tokenizers library.
        model = Unigram([("", 0.0), *tokenizer.sp.scores.items()], unk_id=0)
        return lambda token: _ids([part.value for part in model.tokenize(token)], ids)
    priority = merge_priority(tokenizer)
    return lambda token: _ids(apply_bpe(token, priority).parts, ids)


def spelled(tokenizer: TokenizerFiles, text: str) -> str:
    """Some text as the vocabulary spells it."""
    if tokenizer.kind == "byte_level":
        from llmkit.tokenization.byte_level import from_bytes

        return from_bytes(text.encode())
    return text.replace(" ", SPACE)


def _ids(parts: tuple[str, ...] | list[str], ids: Mapping[str, int]) -> tuple[int, ...]:
    out: list[int] = []
    for part in parts:
        if part in ids:
            out.append(ids[part])
        else:  # byte fallback; without byte pieces nothing stands for it
            out += [ids[name] for byte in part.encode() if (name := f"<0x{byte:02X}>") in ids]
    return tuple(out)
