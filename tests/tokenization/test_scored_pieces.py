"""tokenizer.bin: as llama2.c's exporter writes it from sentencepiece itself, and a model that encodes the same."""

from __future__ import annotations

import struct

import pytest
from sentencepiece import SentencePieceProcessor

from llmkit.errors import InputError
from llmkit.tokenization.scored_pieces import from_scored_pieces, to_scored_pieces
from llmkit.tokenization.sentencepiece_model import SentencePieceModel

TEXTS = [
    "Hello world",
    "  two  spaces ",
    "naïve café 東京 \t tab",
    "line\nbreak",
    "",
    "0123456789 !?",
    "▁ <s> </s> <0x0A>",
]


def exported(processor):
    """What the exporter does, in its own terms: sentencepiece's pieces and scores by id."""
    tokens, scores = [], []
    for i in range(processor.vocab_size()):
        t = processor.id_to_piece(i)
        if i == processor.bos_id():
            t = "\n<s>\n"
        elif i == processor.eos_id():
            t = "\n</s>\n"
        tokens.append(t.replace("▁", " ").encode())
        scores.append(processor.get_score(i))
    out = struct.pack("I", max(map(len, tokens)))
    for b, s in zip(tokens, scores, strict=True):
        out += struct.pack("fI", s, len(b)) + b
    return out


@pytest.fixture(scope="module")
def original(shared):
    return (shared / "tokenizers/llama.model").read_bytes()


@pytest.mark.shared
def test_there_and_back(original):
    processor = SentencePieceProcessor(model_proto=original)
    data = to_scored_pieces(SentencePieceModel.parse(original, "llama"))
    assert data == exported(processor)
    made = from_scored_pieces(data, processor.vocab_size(), "tokenizer.bin")
    assert to_scored_pieces(made) == data
    again = SentencePieceProcessor(model_proto=made.serialized())
    for text in TEXTS:
        assert again.encode(text) == processor.encode(text), text
        assert again.decode(again.encode(text)) == processor.decode(processor.encode(text))
    ids = [processor.unk_id(), processor.bos_id(), processor.eos_id()]
    assert [again.unk_id(), again.bos_id(), again.eos_id()] == ids
    for i in range(260):
        assert (again.is_byte(i), again.is_control(i)) == (processor.is_byte(i), processor.is_control(i))


def test_damaged_files():
    sound = struct.pack("<I", 5) + b"".join(struct.pack("<fI", 0.0, len(t)) + t for t in (b"<unk>", b"\n<s>\n"))
    assert [p.text for p in from_scored_pieces(sound, 2, "t").pieces] == ["<unk>", "<s>"]
    for data in (sound[:-1], sound[:8], sound[:-5] + b"\xff\xff\xff\xff\xff"):
        with pytest.raises(InputError, match=r"t is truncated or no tokenizer\.bin: piece") as caught:
            from_scored_pieces(data, 2, "t")
        assert caught.value.hint
    with pytest.raises(InputError, match="t holds 2 pieces, the model has 3"):
        from_scored_pieces(sound, 3, "t")
