"""The tokenizer of a folder whose own tokenizer is remote code: its kind, and how it is built from the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from llmkit.architecture.tokenizers import SentencePieceFile, TiktokenFile, TokenizerKind, published_tokenizers
from llmkit.errors import InputError
from llmkit.tokenization.added_tokens import added_tokens, special_texts
from llmkit.tokenization.byte_trie import ByteTrie
from llmkit.tokenization.checked import read_tokenizer_json
from llmkit.tokenization.file_codecs import Codec, RanksCodec, SentencePieceCodec
from llmkit.tokenization.file_tokenizer import FileTokenizer
from llmkit.tokenization.tiktoken_ranks import looks_like_ranks

Config = Mapping[str, Any]


def named_classes(settings: Config) -> tuple[str, ...]:
    """The tokenizer classes that tokenizer_config.json names: its own, and those of remote code."""
    remote = settings.get("auto_map") or {}
    stated = remote.get("AutoTokenizer") if isinstance(remote, dict) else remote
    entries = stated if isinstance(stated, list | tuple) else [stated]
    names = [str(settings.get("tokenizer_class") or ""), *(str(e).rpartition(".")[2] for e in entries if e)]
    return tuple(dict.fromkeys(n for n in names if n))


def choose_kind(
    settings: Config, files: Mapping[str, bytes], default: TokenizerKind | None = None
) -> TokenizerKind | None:
    """The kind that reads the tokenizer of a folder, or None: it is none of those that are known.

    Args:
        settings: tokenizer_config.json.
        files: name -> content of the tokenizer files.
        default: the kind that the architecture names; it serves where the settings name no class, or unknown remote
            code.
    """
    names, known = set(named_classes(settings)), published_tokenizers().values()
    candidates = [kind for kind in known if names & set(kind.classes)]
    candidates += [default] if default is not None and (not names or settings.get("auto_map")) else []
    # without a class, a file that only one kind has says enough
    owners = Counter(kind.file for kind in known)
    candidates += [kind for kind in known if not names and owners[kind.file] == 1]
    return next((kind for kind in candidates if kind.file in files and _reads(kind, files[kind.file])), None)


def _reads(kind: TokenizerKind, data: bytes) -> bool:
    """Whether the file is of the kind's format (two kinds call theirs tokenizer.model)."""
    return isinstance(kind, TiktokenFile) == looks_like_ranks(data)


def build_tokenizer(
    kind: TokenizerKind, files: Mapping[str, bytes], settings: Config, config: Config, label: str
) -> FileTokenizer:
    """The tokenizer.

    Args:
        kind: its kind.
        files: name -> content; it must have the kind's file.
        settings: tokenizer_config.json.
        config: config.json, for ids that the file does not tell.
        label: the checkpoint's, for messages.

    Raises:
        InputError: the file is malformed, or disagrees with config.json.
    """
    where = f"{label}: {kind.file}"
    data = files[kind.file]
    specials: dict[str, int] = {}
    codec: Codec
    if isinstance(kind, SentencePieceFile):
        codec, specials = _sentencepiece(kind, data, settings, config, where)
    elif isinstance(kind, TiktokenFile):
        codec = RanksCodec(data, kind, where)
    else:
        codec = ByteTrie.parse(data, where)
        specials[kind.end] = 0
    specials |= {token: codec.n_tokens + i for i, token in enumerate(kind.specials)}
    names = {n: token_name(settings, n, getattr(kind, n)) for n in ("bos", "eos", "pad", "unk")}
    words: dict[str, int] = {}
    for token, (i, is_special) in _added(settings, files, where).items():
        if token not in specials and codec.find(token) != i:
            (specials if is_special or token in names.values() else words)[token] = i
    for text in (*kind.prefix, *kind.suffix, *(t for t in names.values() if t)):
        place = specials.get(text, codec.find(text))
        if place is not None:
            specials[text] = place
        elif text in (*kind.prefix, *kind.suffix):
            raise InputError(
                f"{where} has no token {text!r}, which its tokenizer needs",
                hint="copy the tokenizer of this model from its release again",
            )
    names = {n: t if t in specials else None for n, t in names.items()}
    prefix, suffix = list(kind.prefix), list(kind.suffix)
    if isinstance(kind, SentencePieceFile):
        prefix += [names["bos"]] if names["bos"] and _flag(settings, "add_bos_token", kind.adds_bos) else []
        suffix += [names["eos"]] if names["eos"] and _flag(settings, "add_eos_token", kind.adds_eos) else []
    return FileTokenizer(
        codec,
        specials=specials,
        words=words,
        prefix=[specials[t] for t in prefix],
        suffix=[specials[t] for t in suffix],
        names=names,
        settings=settings,
        answers_after_suffix=bool(kind.suffix),
        padding_side=str(settings.get("padding_side") or "left"),
        name_or_path=label,
    )


def _sentencepiece(
    kind: SentencePieceFile, data: bytes, settings: Config, config: Config, where: str
) -> tuple[Codec, dict[str, int]]:
    codec = SentencePieceCodec(data, kind, where)
    stated = settings.get(kind.offset_key) if kind.offset_key else None
    stated_ids = {k: (token, config[k]) for k, token in (kind.id_keys or {}).items() if isinstance(config.get(k), int)}
    differences = {k: i - place for k, (token, i) in stated_ids.items() if (place := codec.find(token)) is not None}
    offset = int(stated) if isinstance(stated, int) else next(iter(differences.values()), 0)
    for key, difference in differences.items():
        if difference != offset:
            token, id_ = stated_ids[key]
            raise InputError(
                f"{where}: {token} has the id {id_ - difference + offset}, but config.json says {key} {id_}",
                hint=f"copy both files from one release; tokenizer_config.json says {kind.offset_key} {stated}",
            )
    codec.offset = offset
    held = {t: i for t in kind.reserved if (i := codec.find(t)) is not None}
    return codec, held


def _added(settings: Config, files: Mapping[str, bytes], where: str) -> dict[str, tuple[int, bool]]:
    """Token -> its id, and whether it is a special one, of the tokens that were added to the published file."""
    name, listed = "added_tokens.json", None
    if name in files:
        listed = read_tokenizer_json(name, files[name], f"{where.partition(':')[0]}: {name}")
    special = special_texts(settings)
    tokens = added_tokens(listed, settings)
    return {t["content"]: (i, bool(t.get("special")) or t["content"] in special) for i, t in tokens.items()}


def token_name(settings: Config, name: str, default: str | None) -> str | None:
    """The string of a special token (`bos`, `eos`, `pad`, `unk`) by tokenizer_config.json."""
    stated = settings.get(f"{name}_token", default)
    if isinstance(stated, dict):  # an AddedToken
        stated = stated.get("content")
    return str(stated) if stated else None


def _flag(settings: Config, key: str, default: bool | None) -> bool:
    if default is None:
        return False
    stated = settings.get(key)
    return bool(stated) if isinstance(stated, bool) else default
