"""The tokenizer files of a checkpoint as one thing: read together, changed together, written together."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.architecture.tokenizers import SentencePieceFile
from llmkit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmkit.checkpoint.classification import classify
from llmkit.checkpoint.file_content import FileContent
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.errors import InputError, RequirementError
from llmkit.formats import imatrix, safetensors, torch_pickle
from llmkit.formats.folder import is_weight_file
from llmkit.formats.tokenizer_files import TOKENIZER_FILES, FileKind, names_of
from llmkit.formats.unreadable import refuse_no_files
from llmkit.tokenization.added_tokens import added_tokens
from llmkit.tokenization.checked import read_tokenizer_json
from llmkit.tokenization.fast import FastTokenizer
from llmkit.tokenization.published import choose_kind
from llmkit.tokenization.sentencepiece_model import SentencePieceModel
from llmkit.tokenization.tiktoken_ranks import looks_like_ranks, parse_ranks, serialize_ranks

_SENTENCEPIECE = names_of(FileKind.SENTENCEPIECE_OR_RANKS, FileKind.SENTENCEPIECE)
_GGUF = b"GGUF"
_WEIGHTS = (safetensors.looks_like, torch_pickle.looks_like, imatrix.looks_binary)
_TIKTOKEN = names_of(FileKind.SENTENCEPIECE_OR_RANKS, FileKind.RANKS)
_BYTE_LEVEL = names_of(FileKind.VOCABULARY, FileKind.MERGES)


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed tokenizer files of a checkpoint.

    Attributes:
        label: the checkpoint's, for messages.
        files: name -> content of every file of the checkpoint.
        sp_name, sp: the SentencePiece model, the authority where there is one.
        fast: tokenizer.json.
        ranks_name, ranks: a tiktoken file.
        config: tokenizer_config.json.
        added_json: added_tokens.json (token -> id).
    """

    label: str
    files: Mapping[str, FileContent]
    sp_name: str | None = None
    sp: SentencePieceModel | None = None
    fast: FastTokenizer | None = None
    ranks_name: str | None = None
    ranks: Mapping[bytes, int] | None = None
    config: Mapping[str, Any] | None = None
    added_json: Mapping[str, int] | None = None

    @classmethod
    def of(cls, ckpt: Checkpoint) -> TokenizerFiles:
        """Parse the tokenizer files of a checkpoint.

        Raises:
            RequirementError: there are none, or only kinds that cannot be edited.
            InputError: a file is malformed.
        """
        tokenizer = read_tokenizer(ckpt.label, ckpt.files, ckpt.config)
        if tokenizer.sp is None and tokenizer.fast is None:
            raise RequirementError(
                f"{ckpt.label} has {_what(tokenizer)}; a vocabulary is edited in tokenizer.json or a SentencePiece "
                "model",
                hint="load it with transformers and save_pretrained it, which writes tokenizer.json, then try again",
            )
        if tokenizer.sp is not None and tokenizer.fast is None and (why := _fixed_by_code(tokenizer)):
            raise RequirementError(
                f"{ckpt.label}: {why}: a vocabulary of another size would move them",
                hint="put a tokenizer.json that holds all of its tokens into the folder",
            )
        return tokenizer

    @property
    def kind(self) -> str:
        """`sentencepiece` (BPE with scores), `unigram`, `byte_level`, or what tokenizer.json calls its model."""
        if self.sp is not None:
            return {"bpe": "sentencepiece"}.get(self.sp.model_type, self.sp.model_type)
        return self.fast.kind if self.fast is not None else "tiktoken"

    @property
    def n_model(self) -> int:
        """Ids of the model itself; added tokens mostly follow."""
        if self.sp is not None:
            return len(self.sp.pieces)
        return max(self.fast.vocab.values(), default=-1) + 1 if self.fast is not None else 0

    @cached_property
    def added(self) -> Mapping[int, Mapping[str, Any]]:
        """Id -> description of every token that is matched as a whole, specials of the model included."""
        return added_tokens(self.added_json, self.config, self.fast.data if self.fast is not None else None)

    @property
    def model_ids(self) -> Mapping[str, int]:
        """Token -> id of the model itself, without what only added tokens have."""
        return self.sp.ids if self.sp is not None else self.fast.vocab if self.fast is not None else {}

    @cached_property
    def n_tokens(self) -> int:
        """Largest id + 1, added tokens included."""
        return max([self.n_model, *(i + 1 for i in self.added)])

    @cached_property
    def known(self) -> Mapping[str, int]:
        """Token -> id of everything, added tokens included."""
        return {**self.model_ids, **{t["content"]: i for i, t in self.added.items()}}

    def encoder(self) -> Callable[[str], list[int]]:
        """Text -> ids, without bos and eos: SentencePiece's own where there is such a model, else tokenizer.json's.

        A SentencePiece model does not know the added tokens that follow it.
        """
        if self.sp is not None:
            return self.sp.encoder()
        if self.fast is not None:
            return self.fast.encoder()
        raise RequirementError(f"{self.label}: no tokenizer.json or SentencePiece model to encode with")

    def rewritten(
        self,
        new_of: Mapping[int, int],
        *,
        sp: SentencePieceModel | None = None,
        fast: FastTokenizer | None = None,
        new_added: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> dict[str, FileContent]:
        """All files with ids mapped (an id without a new one is left out) and new added tokens entered everywhere.

        Args:
            sp: the new SentencePiece model; None keeps the file.
            fast: the new tokenizer.json with a new model but still its old added tokens; None keeps the model.
            new_added: id -> description of added tokens that are new.
        """
        files, new_added = dict(self.files), dict(new_added or {})
        if sp is not None and self.sp_name is not None:
            files[self.sp_name] = FileContent(data=sp.serialized())
        if self.fast is not None:
            document = (fast or self.fast).renumbered(new_of)
            document = document.with_added([*document.added, *({"id": i, **t} for i, t in sorted(new_added.items()))])
            files["tokenizer.json"] = FileContent(data=document.serialized())
            self._rewrite_slow(files, document)
        if self.config is not None:
            config = dict(self.config)
            decoder = config.get("added_tokens_decoder")
            if isinstance(decoder, dict) or (new_added and self.fast is None):
                kept = {new_of[int(i)]: t for i, t in (decoder or {}).items() if int(i) in new_of}
                config["added_tokens_decoder"] = {str(i): t for i, t in sorted({**kept, **new_added}.items())}
            files["tokenizer_config.json"] = FileContent.of_json(config)
        if self.added_json is not None or (new_added and self.fast is None):
            kept_ids = {t: new_of[i] for t, i in (self.added_json or {}).items() if i in new_of}
            files["added_tokens.json"] = FileContent.of_json(
                {**kept_ids, **{t["content"]: i for i, t in new_added.items()}}
            )
        return files

    def _rewrite_slow(self, files: dict[str, FileContent], fast: FastTokenizer) -> None:
        """vocab.json, merges.txt and tiktoken files say what tokenizer.json says."""
        if "vocab.json" in files:
            files["vocab.json"] = FileContent(data=json.dumps(dict(fast.vocab), ensure_ascii=False).encode())
        if "merges.txt" in files:
            head = files["merges.txt"].read().split(b"\n", 1)[0]
            lines = ([head.decode("utf-8", "replace")] if head.startswith(b"#version") else []) + [
                f"{a} {b}" for a, b in fast.merges
            ]
            files["merges.txt"] = FileContent(data=("\n".join(lines) + "\n").encode())
        if self.ranks_name is not None:
            from llmkit.tokenization.byte_level import to_bytes

            ranks = {data: i for token, i in fast.vocab.items() if (data := to_bytes(token)) is not None}
            ordered = dict(sorted(ranks.items(), key=lambda item: item[1]))
            files[self.ranks_name] = FileContent(data=serialize_ranks(ordered))


def read_tokenizer(
    label: str, files: Mapping[str, FileContent], config: Mapping[str, Any] | None = None
) -> TokenizerFiles:
    """Parse whatever tokenizer files there are (none gives an empty bundle).

    Args:
        label: for messages.
        files: by name.
        config: the model's, which names the class of a tokenizer whose settings do not.

    Raises:
        InputError: a file is malformed.
    """
    sp_name, sp, ranks_name, ranks = None, None, None, None
    for name in _SENTENCEPIECE:
        if name in files and not looks_like_ranks(data := files[name].read()):
            sp_name, sp = name, SentencePieceModel.parse(data, f"{label}: {name}")
            break
    for name in _TIKTOKEN:
        if name in files and looks_like_ranks(data := files[name].read()):
            ranks_name, ranks = name, parse_ranks(data, f"{label}: {name}")
            break
    fast = None
    if "tokenizer.json" in files:
        fast = FastTokenizer.parse(files["tokenizer.json"].read(), f"{label}: tokenizer.json")
    elif sp is None and ranks is None and all(name in files for name in _BYTE_LEVEL):
        fast = _of_merges(label, files, config or {})
    return TokenizerFiles(
        label, files, sp_name, sp, fast, ranks_name, ranks,
        _object(label, files, "tokenizer_config.json"), _object(label, files, "added_tokens.json"),
    )  # fmt: skip


def _of_merges(label: str, files: Mapping[str, FileContent], config: Mapping[str, Any]) -> FastTokenizer | None:
    """The tokenizer.json that transformers makes of vocab.json and merges.txt; None for a class of remote code."""
    try:
        tokenizer = load_tokenizer(Checkpoint(label, {}, config, files))
    except InputError:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else FastTokenizer.parse(backend.to_str().encode(), f"{label}: vocab.json")


def tokenizer_contents(path: Path) -> dict[str, FileContent]:
    """The tokenizer files at a path, by name; empty where there are none.

    Args:
        path: a folder, a weight file that carries a vocabulary (GGUF) or lies beside one, or a tokenizer file, which
            gets the name of its kind.

    Raises:
        InputError: the path, or weights that might carry a vocabulary, cannot be read.
    """
    if path.is_dir():
        refuse_no_files(path, TOKENIZER_FILES)
        inside = sorted(p for p in path.iterdir() if p.is_file())
        files = {p.name: FileContent(path=p) for p in inside if p.name in TOKENIZER_FILES}
        if _has_vocabulary(files) or not any(is_weight_file(p.name) for p in inside):
            return files
        return dict(open_checkpoint(path).files)
    content = FileContent(path=path)
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(_GGUF) or is_weight_file(path.name) or any(looks(head) for looks in _WEIGHTS):
        ckpt = open_checkpoint(path)
        if (contents := classify(ckpt)).kind == "measurements":
            raise InputError(f"{path} is {contents.words}; expected a tokenizer", hint=contents.hint)
        beside = {name: FileContent(path=path.parent / name) for name in TOKENIZER_FILES}
        return dict(ckpt.files) or {name: file for name, file in beside.items() if (path.parent / name).is_file()}
    is_json, is_ranks = head.lstrip()[:1] == b"{", looks_like_ranks(head)
    return {"tokenizer.json" if is_json else "vocab.tiktoken" if is_ranks else "tokenizer.model": content}


def _has_vocabulary(files: Collection[str]) -> bool:
    """Whether one of the files is a vocabulary that can be read as tokens."""
    return any(name in files for name in ("tokenizer.json", *_SENTENCEPIECE, *_TIKTOKEN))


def _object(label: str, files: Mapping[str, FileContent], name: str) -> dict[str, Any] | None:
    if name not in files:
        return None
    return read_tokenizer_json(name, files[name].read(), f"{label}: {name}")


def _fixed_by_code(tokenizer: TokenizerFiles) -> str | None:
    """Why the file does not tell all ids: what its published code puts before and after the pieces."""
    name, settings = tokenizer.sp_name or "", tokenizer.config or {}
    kind = choose_kind(settings, {name: tokenizer.files[name].read()})
    if kind is None:
        return None
    if kind.specials:
        return f"its code numbers special tokens from the end of {name} ({kind.specials[0]} is {tokenizer.n_model})"
    offset = settings.get(kind.offset_key) if isinstance(kind, SentencePieceFile) and kind.offset_key else 0
    return f"its code puts {offset} ids before those of {name}" if offset else None


def _what(tokenizer: TokenizerFiles) -> str:
    if tokenizer.ranks is not None:
        return f"only {tokenizer.ranks_name}, whose special tokens have ids that the model's own code fixes"
    slow = [n for n in ("vocab.json", "vocab.txt") if n in tokenizer.files]
    return f"only {slow[0]}" if slow else "no tokenizer files"
