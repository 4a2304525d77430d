"""The tokenizers of ChatGLM-6B, ChatGLM2 with ChatGLM3, and GLM-4-9B: tokenization_chatglm.py of each (THUDM)."""

from llmkit.architecture.tokenizers import Blanks, SentencePieceFile, TiktokenFile

_BLANKS = Blanks(newline="<n>", tab="<|tab|>", run="<|blank_{n}|>", longest=80)
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

# The first release puts 20,000 ids of images before the pieces.
ICE_TEXT = SentencePieceFile(
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
)

# ChatGLM2 ends with eop; its last ids stay unused.
SENTENCEPIECE = SentencePieceFile(
    file="tokenizer.model",
    classes=("ChatGLMTokenizer",),
    specials=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_ROLES),
    prefix=("[gMASK]", "sop"),
    bos="<s>",
    eos="</s>",
    pad="<unk>",
    unk="<unk>",
)

TIKTOKEN = TiktokenFile(
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
)  # fmt: skip
