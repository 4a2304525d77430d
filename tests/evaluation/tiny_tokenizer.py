"""A tiny byte-level tokenizer, trained on a few questions."""

from __future__ import annotations

from pathlib import Path

WORDS = (
    "The following are multiple choice questions (with answers) about small things.\n\n"
    "Which of these is a fruit?\nA. stone\nB. apple\nC. river\nD. 0.50\nAnswer: B\n\n"
    "How many legs has a spider?\nA. 6\nB. 8\nC. None\nD. 10\nAnswer: B\n\n"
    "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n答案：A\n"
)


def train_tokenizer(folder: Path, *, bos: bool = False, words: str = WORDS) -> None:
    """A byte-level BPE tokenizer of a few hundred pieces; with `bos` it puts <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([words] * 3, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
