"""Texts that begin alike get the ids that each has by itself."""

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmkit.tokenization.shared_prefixes import encode_sharing_prefixes

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
NUMBERS_FROM_BEHIND = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)|\s+(?!\S)|\s+|[^\s\d]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
PIECES = ["a", "is a fruit", "stone", "?", "\n", "\n\n", " ", "   ", "A. ", "Answer:", "12345678", " 7", "…", "答案：",
          "以下是", "。", "'s", "<s>", "</s>", "é", "\t", "0.50", ")", "/", "\r\n", "1" * 50, " " * 40]  # fmt: skip


def made(splitter, *, bos=False, normalizer=None, eos=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(7)  # merges across what the texts are made of
    tokenizer.train_from_iterator(["".join(rng.choices(PIECES, k=400)) for _ in range(20)], trainer)
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    is_prefixed = getattr(splitter, "add_prefix_space", False)  # transformers 4 writes its own into the splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", add_prefix_space=is_prefixed
    )


def texts_that_begin_alike(seed):
    """Headers, questions below them, and letters below those; with what splitters look at where they part."""
    rng = random.Random(seed)

    def some(n):
        return "".join(rng.choice(PIECES) for _ in range(n))

    found = set()
    for _ in range(3):
        header = some(60)
        for _ in range(5):
            question = header + some(rng.choice([0, 1, 5, 60]))
            found |= {question, *(question + end for end in (" A", " B", "\n", " ", "  ", "9", "é"))}
    return sorted(found, key=lambda _: rng.random())


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self.backend_tokenizer, self._tokenizer, self.n = tokenizer.backend_tokenizer, tokenizer, 0

    def __call__(self, texts, **options):
        self.n += sum(map(len, texts))
        return self._tokenizer(texts, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"splitter": GPT2},
        {"splitter": GPT2, "bos": True},
        {"splitter": LLAMA3, "bos": True},
        {"splitter": LLAMA3, "normalizer": normalizers.NFC()},
        {"splitter": DIGITS},
        {"splitter": NUMBERS_FROM_BEHIND},
    ],
    ids=["gpt2", "bos", "llama3", "nfc", "digits", "from_behind"],
)
def test_the_ids_are_those_of_each_text_alone(options):
    tokenizer = made(**options)
    for seed in range(12):
        texts = texts_that_begin_alike(seed)
        counting = Counting(tokenizer)
        for call in ({}, {"add_special_tokens": False}):
            alone = [tokenizer(text, **call)["input_ids"] for text in texts]
            assert encode_sharing_prefixes(counting, texts, call) == alone
        assert counting.n < sum(map(len, texts))  # twice; each by itself would be twice as much


@pytest.mark.parametrize(
    "options",
    [
        {"splitter": GPT2, "eos": True},
        {"splitter": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"splitter": GPT2, "normalizer": normalizers.NFKD()},
        {"splitter": pre_tokenizers.Metaspace()},
    ],
    ids=["end", "prefix_space", "nfkd", "metaspace"],
)
def test_where_a_tail_would_be_encoded_otherwise_each_text_is_encoded_by_itself(options):
    tokenizer = made(**options)
    texts = texts_that_begin_alike(0)
    counting = Counting(tokenizer)
    assert encode_sharing_prefixes(counting, texts, {}) == [tokenizer(text)["input_ids"] for text in texts]
    assert counting.n >= sum(map(len, texts))
