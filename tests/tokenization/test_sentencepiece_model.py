"""SentencePiece models are read as SentencePiece reads them, and written back byte for byte."""

from __future__ import annotations

import hashlib

import pytest
from sentencepiece import SentencePieceProcessor

from llmkit.errors import InputError
from llmkit.tokenization.sentencepiece_model import Piece, PieceKind, SentencePieceModel
from llmkit.tokenization.vocabulary import count_pieces


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_pieces_are_those_of_sentencepiece(world, model_type):
    data = world.sp_model(world.ENGLISH, 400, model_type=model_type, user_defined_symbols=["<sep>"])
    found = SentencePieceModel.parse(data, "test")
    theirs = SentencePieceProcessor(model_proto=data)
    assert [p.text for p in found.pieces] == [theirs.id_to_piece(i) for i in range(theirs.vocab_size())]
    assert [p.score for p in found.pieces] == [theirs.get_score(i) for i in range(theirs.vocab_size())]
    checks = {
        PieceKind.BYTE: theirs.is_byte, PieceKind.CONTROL: theirs.is_control, PieceKind.UNKNOWN: theirs.is_unknown,
        PieceKind.UNUSED: theirs.is_unused,
    }  # fmt: skip
    for kind, is_kind in checks.items():
        assert [p.kind is kind for p in found.pieces] == [is_kind(i) for i in range(theirs.vocab_size())]
    assert found.pieces[found.ids["<sep>"]].kind is PieceKind.USER_DEFINED
    assert found.model_type == model_type
    assert (found.normalizer, found.trims_spaces, found.has_byte_fallback) == ("identity", False, True)
    assert found.serialized() == data
    assert count_pieces(data) == theirs.vocab_size()


def test_new_pieces_follow_the_old_ones(world):
    data = world.sp_model(world.ENGLISH, 350)
    old = SentencePieceModel.parse(data, "test")
    made = old.extended([Piece("世界", 0.0), Piece("▁和平", -7.5, PieceKind.USER_DEFINED)])
    theirs = SentencePieceProcessor(model_proto=made.serialized())
    n = len(old.pieces)
    assert [theirs.id_to_piece(i) for i in range(n, n + 2)] == ["世界", "▁和平"]
    assert [theirs.get_score(i) for i in range(n, n + 2)] == [0.0, -7.5]
    again = SentencePieceModel.parse(made.serialized(), "test")
    assert again.pieces == made.pieces
    assert again.rest == old.rest


def test_bytes_are_those_that_protobuf_writes(world):
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", exc_type=ImportError)
    data = world.sp_model(world.ENGLISH, 350)
    proto = pb.ModelProto()
    proto.ParseFromString(data)
    piece = pb.ModelProto.SentencePiece()
    piece.piece, piece.score = "世界", 0
    proto.pieces.append(piece)
    assert SentencePieceModel.parse(data, "t").extended([Piece("世界", 0.0)]).serialized() == proto.SerializeToString()


@pytest.mark.parametrize("data", [b"", b"\x0a", b"not a model at all", b'{"model": {}}'])
def test_what_is_no_model_is_refused(data):
    with pytest.raises(InputError, match="no SentencePiece model"):
        SentencePieceModel.parse(data, "x/tokenizer.model")


def test_a_truncated_model_is_refused(world):
    data = world.sp_model(world.ENGLISH, 350)
    with pytest.raises(InputError, match=r"x/tokenizer\.model is truncated"):
        SentencePieceModel.parse(data[:1000], "x/tokenizer.model")


def test_the_real_models(shared):
    llama = (shared / "tokenizers" / "llama.model").read_bytes()
    chinese = (shared / "tokenizers" / "chinese_sp.model").read_bytes()
    base, more = SentencePieceModel.parse(llama, "llama"), SentencePieceModel.parse(chinese, "chinese")
    assert (len(base.pieces), len(more.pieces)) == (32000, 20000)
    assert (base.model_type, more.model_type) == ("bpe", "unigram")
    assert base.serialized() == llama
    merged = base.extended(Piece(p.text, 0.0) for p in more.pieces if p.text not in base.ids)
    assert len(merged.pieces) == 49953
    # The bytes of Chinese-LLaMA's merge_tokenizers.py with SentencePiece's protobuf module on the same two files.
    digest = hashlib.sha256(merged.serialized()).hexdigest()
    assert digest == "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
