"""The vocabulary of a checkpoint as GGUF metadata.

Every id of the embedding has a token: pieces of the model, added tokens, and `[PAD7]` where there is none. Source of
types, scores and keys: ggml-org/llama.cpp, conversion/base.py and gguf-py/gguf/vocab.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.architecture.tokenizers import (
    ByteTrieFile,
    SentencePieceFile,
    TiktokenFile,
    TokenizerKind,
    published_tokenizers,
)
from llmkit.checkpoint.file_content import FileContent
from llmkit.errors import LlmkitError, listing
from llmkit.formats.json_text import parse_object
from llmkit.tokenization.added_tokens import named_specials
from llmkit.tokenization.bpe import apply_bpe, scores_of_merges
from llmkit.tokenization.bundle import TokenizerFiles, read_tokenizer
from llmkit.tokenization.byte_level import from_bytes
from llmkit.tokenization.byte_strings import escaped
from llmkit.tokenization.byte_trie import ByteTrie
from llmkit.tokenization.checked import template_text
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.from_gguf import reader_of
from llmkit.tokenization.parity import compare, tied_texts
from llmkit.tokenization.pieces_tokenizer import ADDED_SCORE
from llmkit.tokenization.pretokenizers import name_of, name_of_pattern
from llmkit.tokenization.published import choose_kind
from llmkit.tokenization.sentencepiece_model import SPACE, PieceKind, SentencePieceModel

_PAD_SCORE = -10000.0
_NO_NAME = "llama.cpp has no name for how the tokenizer cuts text into words: with its default some ids will differ"
_MATCHED = ("lstrip", "rstrip", "single_word")
_MENDS = re.compile(r"fix_\w+_regex")  # a family's, for files published with a wrong pattern
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
# Name in tokenizer_config.json and config.json -> in GGUF.
_SPECIALS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


@dataclass
class _Entries:
    """One token for each id."""

    n: int
    tokens: list[str] = field(init=False)
    scores: list[float] = field(init=False)
    types: list[int] = field(init=False)
    n_beyond: int = 0

    def __post_init__(self) -> None:
        self.tokens = [f"[PAD{i}]" for i in range(self.n)]
        self.scores = [_PAD_SCORE] * self.n
        self.types = [int(PieceKind.UNUSED)] * self.n

    def put(self, i: int, text: str, score: float, kind: PieceKind) -> None:
        if i < self.n:
            self.tokens[i], self.scores[i], self.types[i] = text, score, int(kind)
        else:
            self.n_beyond += 1


_Made = tuple[dict[str, Any], _Entries, list[str]]


def vocabulary_metadata(
    label: str,
    files: Mapping[str, FileContent],
    config: Mapping[str, Any],
    n_rows: int,
    *,
    kind: TokenizerKind | None = None,
    pre: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The metadata `tokenizer.*` of a checkpoint's tokenizer, and warnings; nothing where there are no files.

    Args:
        n_rows: rows of the embedding.
        kind: of a tokenizer that was published as remote code, where tokenizer_config.json does not name it.
        pre: GGUF's name of how text is cut into words, where the files fit several.

    Raises:
        InputError: a malformed file.
    """
    tokenizer = read_tokenizer(label, files, config)
    published = {k.file: files[k.file].read() for k in published_tokenizers().values() if k.file in files}
    kind = choose_kind(tokenizer.config or {}, published, kind)
    made = _made(tokenizer, published, n_rows, kind, pre)
    if made is None:
        odd = f"a tokenizer ({tokenizer.kind}) that GGUF has no place for"
        what = odd if tokenizer.fast is not None else "no tokenizer"
        return {}, [f"{label} has {what}: the file gets no vocabulary, and llama.cpp will not load it"]
    metadata, entries, warnings = made
    if entries.n_beyond:
        warnings.append(f"{entries.n_beyond} tokens have no row in the embedding and are left out of the vocabulary")
    merges = metadata.pop("merges", None)
    metadata |= {"tokens": entries.tokens}
    is_bytes = isinstance(kind, ByteTrieFile)
    metadata |= {"scores": entries.scores} if merges is None and not is_bytes else {}
    metadata |= {"token_type": entries.types}
    metadata |= {"merges": merges} if merges is not None else {}
    metadata |= _special_ids(tokenizer, config, n_rows, entries, kind)
    at_ends, told = _added_at_ends(tokenizer, kind, merges is not None)
    metadata |= at_ends
    result = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    if not warnings and tokenizer.ranks is None and not is_bytes:
        warnings += _differences(tokenizer, result)
    return result | _templates(tokenizer), [*warnings, *told, *_untold(tokenizer)]


def _made(
    tokenizer: TokenizerFiles,
    published: Mapping[str, bytes],
    n_rows: int,
    kind: TokenizerKind | None,
    pre: str | None,
) -> _Made | None:
    """The vocabulary by what the tokenizer is made of, the most exact of its files first; None for what GGUF lacks."""
    if tokenizer.sp is not None:
        return _sentencepiece(tokenizer, tokenizer.sp, n_rows, kind, pre)
    if tokenizer.fast is not None:
        if tokenizer.fast.kind == "sentencepiece":
            return _sentencepiece_json(tokenizer, tokenizer.fast, n_rows)
        return _byte_level(tokenizer, tokenizer.fast, n_rows, pre) if tokenizer.fast.kind == "byte_level" else None
    if tokenizer.ranks is not None and isinstance(kind, TiktokenFile):
        return _ranks(tokenizer, tokenizer.ranks, n_rows, kind)
    if isinstance(kind, ByteTrieFile):
        trie = ByteTrie.parse(published[kind.file], f"{tokenizer.label}: {kind.file}")
        return _byte_strings(tokenizer, trie, n_rows, kind)
    return None


def _differences(tokenizer: TokenizerFiles, metadata: Mapping[str, Any]) -> list[str]:
    """Texts that llama.cpp's reading of the vocabulary tokenizes differently from the source tokenizer."""
    scores = tokenizer.sp.scores if tokenizer.sp is not None else {}
    try:
        # a SentencePiece model does not know its special tokens in text
        reader = reader_of(metadata, with_special=tokenizer.sp is None)
        other = compare(tokenizer.encoder(), reader, more=tied_texts(scores))
    except LlmkitError as error:
        return [f"the vocabulary could not be compared with its source: {error.message}"]
    source = tokenizer.sp_name or "tokenizer.json"
    return [] if other is None else [f"llama.cpp cuts text otherwise than {source}: {other}"]


def _sentencepiece(
    tokenizer: TokenizerFiles, sp: SentencePieceModel, n_rows: int, kind: TokenizerKind | None, pre: str | None
) -> _Made:
    entries = _Entries(n_rows)
    warnings: list[str] = []
    for i, piece in enumerate(sp.pieces):
        entries.put(i, piece.text, piece.score, piece.kind)
    metadata: dict[str, Any] = {"model": "llama", "pre": pre if pre is not None and pre.endswith("-spm") else "default"}
    if isinstance(kind, SentencePieceFile):
        for i, text in enumerate(kind.specials, len(sp.pieces)):
            entries.put(i, text, 0.0, PieceKind.CONTROL)
    for text, i in (tokenizer.added_json or {}).items():
        entries.put(i, text, ADDED_SCORE, PieceKind.USER_DEFINED)
    decoder = (tokenizer.config or {}).get("added_tokens_decoder")
    stated = {int(i): t for i, t in decoder.items() if str(i).isdigit()} if isinstance(decoder, dict) else {}
    later = {i: t for i, t in tokenizer.added.items() if i >= len(sp.pieces)}
    for i, token in sorted({**later, **stated}.items()):
        _put_added(entries, i, token)
    if sp.model_type != "bpe":
        warnings.append(
            f"the SentencePiece model is of type {sp.model_type}, which llama.cpp reads as BPE: its ids will differ"
        )
    if not sp.has_dummy_prefix or "add_prefix_space" in (tokenizer.config or {}):
        metadata["add_space_prefix"] = sp.has_dummy_prefix
    return metadata, entries, warnings


def _sentencepiece_json(tokenizer: TokenizerFiles, fast: FastTokenizer, n_rows: int) -> _Made:
    """SentencePiece's BPE as tokenizer.json: scores under which the merges come in their order."""
    entries = _Entries(n_rows)
    scores = scores_of_merges(fast.merges)
    lowest = -float(len(fast.merges))
    unknown = fast.data["model"].get("unk_token")
    for text, i in fast.vocab.items():
        if _BYTE.fullmatch(text):
            entries.put(i, text, 0.0, PieceKind.BYTE)
        else:
            kind = PieceKind.UNKNOWN if text == unknown else PieceKind.NORMAL
            entries.put(i, text, scores.get(text, lowest), kind)
    for i, token in tokenizer.added.items():
        if fast.vocab.get(str(token.get("content"))) != i or token.get("content") != unknown:
            _put_added(entries, i, token)
    return {"model": "llama", "pre": "default", "add_space_prefix": fast.adds_space}, entries, []


def _byte_level(tokenizer: TokenizerFiles, fast: FastTokenizer, n_rows: int, pre: str | None) -> _Made:
    entries = _Entries(n_rows)
    for text, i in fast.vocab.items():
        entries.put(i, text, 0.0, PieceKind.NORMAL)
    for i, token in tokenizer.added.items():
        _put_added(entries, i, token)
    warnings = []
    name = name_of(fast.data.get("pre_tokenizer"), fast.data.get("normalizer"), pre)
    if name is None:
        name = "default"
        warnings.append(_NO_NAME)
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in fast.merges]
    return {"model": "gpt2", "pre": name, "merges": merges}, entries, warnings


def _ranks(tokenizer: TokenizerFiles, ranks: Mapping[bytes, int], n_rows: int, kind: TiktokenFile) -> _Made:
    """A tiktoken file: the merge that makes a token is of what the lower ranks leave of its bytes."""
    entries = _Entries(n_rows)
    merges = []
    by_text: dict[str, float] = {}  # those of lower rank: what can have been merged before
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        text = from_bytes(token)
        entries.put(rank, text, 0.0, PieceKind.NORMAL)
        parts = apply_bpe(text, lambda left, right: by_text.get(left + right)).parts
        merges += [" ".join(parts)] if len(parts) == 2 else []
        by_text[text] = rank
    for i, text in enumerate(kind.specials, len(ranks)):
        entries.put(i, text, 0.0, PieceKind.CONTROL)
    for i, token_data in tokenizer.added.items():
        _put_added(entries, i, token_data)
    name = name_of_pattern(kind.pattern)
    warnings = [] if name is not None else [_NO_NAME]
    return {"model": "gpt2", "pre": name or "default", "merges": merges}, entries, warnings


def _byte_strings(tokenizer: TokenizerFiles, trie: ByteTrie, n_rows: int, kind: ByteTrieFile) -> _Made:
    """Byte strings; a blank line ends what a chat model says, as llama.cpp has it for them."""
    entries = _Entries(n_rows)
    for i, data in trie.tokens.items():
        entries.put(i, escaped(data), 0.0, PieceKind.NORMAL)
    for i, text in {0: kind.end, **{i: str(t.get("content")) for i, t in tokenizer.added.items()}}.items():
        if i not in trie.tokens:
            entries.put(i, escaped(text.encode()), 0.0, PieceKind.CONTROL)
    blank_line = trie.find("\n\n")
    return {"model": "rwkv", **({} if blank_line is None else {"eot_token_id": blank_line})}, entries, []


def _put_added(entries: _Entries, i: int, token: Mapping[str, Any]) -> None:
    text = str(token.get("content"))
    if token.get("special") or _LOOKS_SPECIAL.fullmatch(text):
        entries.put(i, text, ADDED_SCORE, PieceKind.CONTROL)
    else:
        entries.put(i, text.replace(SPACE, " "), ADDED_SCORE, PieceKind.USER_DEFINED)


def _special_ids(
    tokenizer: TokenizerFiles, config: Mapping[str, Any], n_rows: int, entries: _Entries, kind: TokenizerKind | None
) -> dict[str, int]:
    """Ids of special tokens: those that tokenizer_config.json names, else those of config.json, else of the kind."""
    ids: dict[str, int] = {}
    for name, key in _SPECIALS.items():
        stated = (tokenizer.config or {}).get(f"{name}_token")
        text = stated.get("content") if isinstance(stated, dict) else stated
        value = tokenizer.known.get(text) if isinstance(text, str) else None
        of_config = config.get(f"{name}_token_id")
        if value is None:
            value = (
                next((i for i in of_config if isinstance(i, int)), None) if isinstance(of_config, list) else of_config
            )
        if value is None and (usual := getattr(kind, name, None)) in entries.tokens:
            value = entries.tokens.index(usual)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < n_rows:
            ids[f"{key}_token_id"] = value
    stated = config.get("eos_token_id")
    eos_ids = stated if isinstance(stated, list) else []
    others = [i for i in eos_ids if isinstance(i, int) and i != ids.get("eos_token_id")]
    return ids | {f"{key}_token_id": i for key, i in zip(("eot", "eom"), others, strict=False)}


def _untold(tokenizer: TokenizerFiles) -> list[str]:
    """How added tokens are matched, for which GGUF has no place."""
    warnings = []
    greedy = [str(t["content"]) for t in tokenizer.added.values() if any(t.get(flag) for flag in _MATCHED)]
    if greedy:
        warnings.append(
            f"GGUF cannot say that {listing(greedy, 3)} take the spaces beside them, or stand for whole words alone "
            f"({', '.join(_MATCHED)}): text with them is cut otherwise"
        )
    prefixed = (tokenizer.config or {}).get("add_prefix_space")
    if prefixed is True and tokenizer.fast is not None and not tokenizer.fast.adds_space:
        warnings.append(
            "tokenizer_config.json has add_prefix_space true, which tokenizer.json has not: some classes of "
            "transformers put a space before a text, llama.cpp none"
        )
    mended = [key for key, value in (tokenizer.config or {}).items() if value is True and _MENDS.fullmatch(key)]
    if mended and tokenizer.fast is not None:
        warnings.append(
            f"tokenizer_config.json has {mended[0]} true, by which transformers may cut text into words by another "
            "pattern than that of tokenizer.json, which the GGUF file has"
        )
    mapped = tokenizer.files.get("special_tokens_map.json")
    named = named_specials(
        tokenizer.config or {}, None if mapped is None else parse_object(mapped.read(), "special_tokens_map.json")
    )
    new = [text for text in named if text not in tokenizer.known]
    if new and (tokenizer.sp is not None or tokenizer.fast is not None):
        warnings.append(
            f"the files name special tokens without an id, {listing(new, 3)}: transformers gives them the next ids, "
            "the GGUF file has none of them"
        )
    return warnings


def _added_at_ends(
    tokenizer: TokenizerFiles, kind: TokenizerKind | None, is_byte_level: bool
) -> tuple[dict[str, bool], list[str]]:
    """Whether bos and eos are put around a text, and warnings.

    As the post-processor of tokenizer.json does, by which transformers goes; else as tokenizer_config.json says.
    """
    stated, around, warnings = tokenizer.config or {}, dict[str, bool](), list[str]()
    template = None if tokenizer.fast is None else _template(tokenizer.fast.data)
    for name, place in (("bos", 0), ("eos", -1)):
        key, is_done = f"add_{name}_token", template is not None and "SpecialToken" in template[place]
        if template is not None and len(template) > 1:
            around[key] = is_done
        elif isinstance(stated.get(key), bool):
            around[key] = stated[key]
        elif name == "bos" and (
            is_byte_level if tokenizer.fast is not None else isinstance(kind, SentencePieceFile) and not kind.adds_bos
        ):
            around[key] = False
        if tokenizer.fast is not None and isinstance(stated.get(key), bool) and stated[key] != is_done:
            warnings.append(
                f"tokenizer_config.json has {key} {json.dumps(stated[key])}, and tokenizer.json puts "
                f"{name if is_done else f'no {name}'} around a text: transformers goes by the latter, the GGUF file "
                f"says {json.dumps(around[key])}"
            )
    return around, warnings


def _template(data: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    processor = data.get("post_processor") or {}
    for one in processor.get("processors", [processor]):
        if one.get("type") == "TemplateProcessing":
            return list(one.get("single") or []) or None
    return None


def _templates(tokenizer: TokenizerFiles) -> dict[str, Any]:
    template = (tokenizer.config or {}).get("chat_template")
    if "chat_template.jinja" in tokenizer.files:  # which transformers takes before the other
        template = template_text(tokenizer.files["chat_template.jinja"].read(), "chat_template.jinja")
    if isinstance(template, list):
        named = {str(t.get("name")): str(t.get("template")) for t in template if isinstance(t, dict)}
        others = {f"tokenizer.chat_template.{name}": text for name, text in named.items() if name != "default"}
        main = {"tokenizer.chat_template": named["default"]} if "default" in named else {}
        listed = {"tokenizer.chat_templates": [n for n in named if n != "default"]} if others else {}
        return {**main, **listed, **others}
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
