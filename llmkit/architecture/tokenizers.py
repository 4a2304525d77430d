"""Tokenizers that were published with code of their own, as data: which file, which special tokens, where they go.

A folder whose tokenizer is a class of remote code still holds the vocabulary in a file of a known format. What the
code adds to it (ids of special tokens, the tokens around a text, spellings of blanks) is told here, so that the file
is read and the code is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Blanks:
    """Line ends, tabs and runs of spaces that the text spells as pieces of their own.

    Attributes:
        newline, tab: the pieces.
        run: the piece of a run of spaces, with `{n}`.
        longest: the longest run that has a piece; the shortest is 2.
    """

    newline: str
    tab: str
    run: str
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Published:
    """What the kinds have in common.

    Attributes:
        file: the file that holds the vocabulary.
        classes: the remote classes, by the names that tokenizer_config.json gives them.
        specials: tokens that the code adds after the file's last id, in this order.
        prefix, suffix: special tokens around every text.
        bos, eos, pad, unk: their strings, where tokenizer_config.json does not say; None for none.
        padding_side: where the original pads.
    """

    file: str
    classes: tuple[str, ...] = ()
    specials: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    padding_side: str = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceFile(_Published):
    """A SentencePiece model.

    Attributes:
        reserved: pieces of the file that are special tokens: they are never looked for in text.
        appended: pieces that follow the reserved ones in a file, with byte fallback; the code appended all of them to
            files that have no reserved ones.
        blanks: how line ends and blanks are spelt; None leaves them as they are.
        offset_key: the key of tokenizer_config.json with the id of the model's first piece.
        id_keys: keys of config.json with the id of a special token, which tell the offset where nothing else does.
        adds_bos, adds_eos: whether they are put around a text where tokenizer_config.json does not say; None for a
            tokenizer that knows no such keys.
    """

    reserved: tuple[str, ...] = ()
    appended: tuple[str, ...] = ()
    blanks: Blanks | None = None
    offset_key: str | None = None
    id_keys: Mapping[str, str] | None = None
    adds_bos: bool | None = None
    adds_eos: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TiktokenFile(_Published):
    """Byte-pair ranks in base64, one a line, and the pattern that cuts a text into words.

    Attributes:
        is_composed: a text is brought to Unicode's composed form (NFC) first.
    """

    pattern: str
    is_composed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTrieFile(_Published):
    """Byte strings, one a line as `id literal length`; a text becomes the longest that fits, from left to right.

    Attributes:
        end: the string of id 0, which the file leaves out.
    """

    end: str


TokenizerKind = SentencePieceFile | TiktokenFile | ByteTrieFile

_BLANKS = Blanks(newline="<n>", tab="<|tab|>", run="<|blank_{n}|>", longest=80)
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

TOKENIZERS: Mapping[str, TokenizerKind] = {
    # THUDM, ChatGLM-6B: tokenization_chatglm.py. The first release puts 20,000 ids of images before the pieces.
    "ice-text": SentencePieceFile(
        file="ice_text.model",
        classes=("ChatGLMTokenizer",),
        reserved=("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"),
        appended=(_BLANKS.tab, *(_BLANKS.run.replace("{n}", str(n)) for n in range(2, _BLANKS.longest + 1))),
        suffix=("[gMASK]", "<sop>"),
        bos="<sop>",
        eos="<eop>",
        pad="<pad>",
        unk="<unk>",
        blanks=_BLANKS,
        offset_key="num_image_tokens",
        id_keys={"gmask_token_id": "[gMASK]", "bos_token_id": "<sop>"},
    ),
    # THUDM, ChatGLM2-6B and ChatGLM3-6B: tokenization_chatglm.py. The first ends with eop; its last ids stay unused.
    "glm-sentencepiece": SentencePieceFile(
        file="tokenizer.model",
        classes=("ChatGLMTokenizer",),
        specials=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_ROLES),
        prefix=("[gMASK]", "sop"),
        bos="<s>",
        eos="</s>",
        pad="<unk>",
        unk="<unk>",
    ),
    # THUDM, GLM-4-9B: tokenization_chatglm.py
    "glm-tiktoken": TiktokenFile(
        file="tokenizer.model",
        classes=("ChatGLM4Tokenizer", "ChatGLMTokenizer"),
        pattern=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        specials=(
            "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *_ROLES,
            "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
        ),
        prefix=("[gMASK]", "<sop>"),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
    ),
    # Qwen 1: tokenization_qwen.py; transformers' class of Qwen 2 cuts texts in the same way
    "qwen-tiktoken": TiktokenFile(
        file="qwen.tiktoken",
        classes=("QWenTokenizer",),
        pattern=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        is_composed=True,
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
    ),
    # Baichuan 1 and 2: tokenization_baichuan.py; the reserved tokens are the roles of the chat models
    "baichuan": SentencePieceFile(
        file="tokenizer.model",
        classes=("BaichuanTokenizer", "BaiChuanTokenizer"),
        reserved=("<reserved_102>", "<reserved_103>", "<reserved_106>", "<reserved_107>"),
        bos="<s>",
        eos="</s>",
        unk="<unk>",
        adds_bos=True,
        adds_eos=False,
    ),
    # Meta, llama/tokenizer.py; transformers' class of that name before tokenizer.json was published with it
    "llama": SentencePieceFile(
        file="tokenizer.model",
        classes=("LlamaTokenizer", "LLaMATokenizer", "LlamaTokenizerFast"),
        bos="<s>",
        eos="</s>",
        unk="<unk>",
        adds_bos=True,
        adds_eos=False,
    ),
    # ChatRWKV, tokenizer/rwkv_tokenizer.py
    "rwkv-world": ByteTrieFile(
        file="rwkv_vocab_v20230424.txt",
        classes=("RWKVWorldTokenizer", "RwkvTokenizer", "Rwkv5Tokenizer", "Rwkv6Tokenizer"),
        end="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        padding_side="left",
    ),
}  # fmt: skip
