"""The tokenizer of Qwen 1: tokenization_qwen.py; transformers' class of Qwen 2 cuts texts in the same way."""

from llmkit.architecture.tokenizers import TiktokenFile

TOKENIZER = TiktokenFile(
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
)
