"""First values of new rows against plain torch and transformers; slices against the whole."""

from __future__ import annotations

import pytest
import torch
import vocab_world as world
from sentencepiece import SentencePieceProcessor

import llmkit
from llmkit.errors import InputError, RequirementError
from llmkit.tensors.lazy import Context
from llmkit.transforms import vocab
from llmkit.transforms.vocab.focus import sparsemax
from llmkit.transforms.vocab.initial import new_rows
from llmkit.transforms.vocab.rows import arranged

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    base = world.sp_model(world.ENGLISH, 360)
    (folder / "zh.model").write_bytes(world.sp_model(world.CHINESE, 420, model_type="unigram"))
    (folder / "zh.txt").write_text("\n".join(world.CHINESE * 3))
    n = SentencePieceProcessor(model_proto=base).vocab_size()
    ckpt = world.model(folder / "m", n, world.sp_files(base), hidden=64)
    return folder, ckpt, SentencePieceProcessor(model_proto=base), n


def extended(case, init, **options):
    folder, ckpt, base, n = case
    out = vocab.extend(ckpt, folder / "zh.model", init=init, **options)
    return out, SentencePieceProcessor(model_proto=out.files["tokenizer.model"].read()), base, n


@pytest.mark.parametrize("name", MATRICES)
def test_old_rows_stay_and_mean_is_the_mean(case, name):
    out, ours, _, n = extended(case, "mean")
    old, new = case[1].tensors[name].load(), out.tensors[name].load()
    assert new.shape[0] == ours.vocab_size() == out.config["vocab_size"]
    assert new[:n].equal(old)
    expected = old.double().mean(0).to(old.dtype)
    assert new[n:].equal(expected.expand(new.shape[0] - n, -1))


@pytest.mark.parametrize("name", MATRICES)
def test_pieces_is_the_mean_of_the_old_tokenization(case, name):
    out, ours, base, n = extended(case, "pieces", pad_to_multiple=64)
    old, new = case[1].tensors[name].load(), out.tensors[name].load()
    n_checked = 0
    for i in range(n, ours.vocab_size()):
        piece = ours.id_to_piece(i)
        ids = base.encode(piece.removeprefix("▁"))  # SentencePiece puts a ▁ in front
        if not piece.startswith("▁"):
            if base.id_to_piece(ids[0]) != "▁":
                continue
            ids = ids[1:]
        expected = old[ids].float().mean(0)
        assert torch.allclose(new[i].float(), expected, rtol=0, atol=2**-10 * expected.abs().max().item()), piece
        n_checked += 1
    assert n_checked > 20
    mean = old.double().mean(0).to(old.dtype)
    assert new[ours.vocab_size() :].equal(mean.expand(new.shape[0] - ours.vocab_size(), -1))
    assert new.shape[0] % 64 == 0


def test_zero_is_zero(case):
    out, _, _, n = extended(case, "zero")
    assert not world.rows(out)[n:].any()


def matrix_of(x):
    from llmkit.tensors.lazy import Apply
    from llmkit.tensors.spec import DType, TensorSpec

    spec = TensorSpec(DType.of(x.dtype), tuple(x.shape))
    return Apply("given", [], spec, lambda: x, row_step=None).output()


def test_normal_has_the_moments_that_transformers_documents():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=g)
    old = torch.randn(4000, 8, generator=g) @ mix + 3
    made = new_rows(matrix_of(old), [()] * 20000, init="normal", seed=1).load()
    mean = old.mean(0)
    covariance = (old - mean).T @ (old - mean) / len(old)
    centred = (made.double() - made.double().mean(0)) / 1e-9**0.5
    assert torch.allclose(made.mean(0), mean, atol=1e-5)
    assert torch.allclose((centred.T @ centred / len(made)).float(), covariance, atol=0.05 * covariance.abs().max())
    again = new_rows(matrix_of(old), [()] * 20000, init="normal", seed=1).load()
    other = new_rows(matrix_of(old), [()] * 20000, init="normal", seed=2).load()
    assert made.equal(again)
    assert not made.equal(other)


def test_normal_is_the_mean_where_transformers_takes_the_mean():
    """Fewer rows than columns: the covariance is singular."""
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    old = model.get_input_embeddings().weight.detach().clone()
    resized: nn.Embedding = model.resize_token_embeddings(15, mean_resizing=True)
    made = new_rows(matrix_of(old), [()] * 3, init="normal", seed=0).load()
    assert torch.allclose(made, resized.weight[12:], atol=1e-7)


@pytest.mark.parametrize("init", ["mean", "pieces", "zero", "normal"])
@pytest.mark.parametrize("step", [1, 7, 100])
def test_slices_are_the_whole(case, init, step):
    out, *_ = extended(case, init, pad_to_multiple=8)
    lazy = out.tensors["lm_head.weight"]
    whole = lazy.load()
    context = Context()
    n = lazy.node.n_rows
    parts = [lazy.node.evaluate((i, min(i + step, n)), context)[0] for i in range(0, n, step)]
    assert torch.cat(parts).equal(whole)


def test_scattered_rows_are_gathered():
    g = torch.Generator().manual_seed(0)
    old = torch.randn(500, 4, generator=g)
    order = torch.randperm(500, generator=g)[:300].tolist()
    lazy = arranged(matrix_of(old), order, None)
    assert lazy.load().equal(old[order])
    made = matrix_of(torch.randn(2, 4, generator=g))
    mixed = [*order[:50], None, *order[50:], None]
    expected = torch.cat([old[order[:50]], made.load()[:1], old[order[50:]], made.load()[1:]])
    assert arranged(matrix_of(old), mixed, made).load().equal(expected)


def test_a_tied_head_stays_tied(case, tmp_path):
    folder, _, base, n = case
    ckpt = world.model(tmp_path / "m", n, world.sp_files(base.serialized_model_proto()), hidden=16, tied=True)
    out = vocab.extend(ckpt, folder / "zh.model")
    assert "lm_head.weight" not in out.tensors
    assert out.config["tie_word_embeddings"] is True
    assert any("which is the head too" in note for note in out.notes)
    llmkit.save(out, tmp_path / "out")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.shape[0] == out.config["vocab_size"]


def test_padding_that_was_there_becomes_rows_of_new_tokens(case, tmp_path):
    _, _, base, n = case
    ckpt = world.model(tmp_path / "m", n + 5, world.sp_files(base.serialized_model_proto()), hidden=16)
    (tmp_path / "two.txt").write_text("<one>\n<two>\n")
    out = vocab.extend(ckpt, tmp_path / "two.txt")
    old, new = world.rows(ckpt), world.rows(out)
    assert new.shape == old.shape
    assert new[:n].equal(old[:n])
    assert new[n + 2 :].equal(old[n + 2 :])
    assert new[n].equal(new[n + 1])
    assert not new[n].equal(old[n])


@pytest.mark.parametrize("multiple", [0, 10**11])
def test_padding_beyond_any_vocabulary_is_refused(case, tmp_path, multiple):
    """A list of as many rows would fill the memory before the plan could tell what they take."""
    with pytest.raises(InputError, match=f"pad_to_multiple {multiple}: expected 1 to"):
        vocab.extend(case[1], case[0] / "zh.model", pad_to_multiple=multiple)


def test_a_quantized_head_is_refused(case, tmp_path):
    from llmkit.transforms.quantize import quantize

    folder, ckpt, *_ = case
    packed = quantize(ckpt, bits=8)
    tensors = dict(packed.tensors)
    tensors["lm_head.weight_packed"] = tensors.pop("lm_head.weight")
    with pytest.raises(RequirementError, match=r"lm_head\.weight is quantized") as caught:
        vocab.extend(packed.derive(tensors=tensors), folder / "zh.model")
    assert "llmkit quantize" in caught.value.hint
    out = vocab.extend(packed, folder / "zh.model")  # the head is float: fine
    assert out.config["quantization_config"] == packed.config["quantization_config"]


def test_sparsemax_is_the_projection_on_the_simplex():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 12, generator=g).sort(dim=1, descending=True).values
    found = sparsemax(scores)
    for z, p in zip(scores.double(), found.double(), strict=True):
        low, high = float(z.min()) - 1, float(z.max())
        for _ in range(60):  # bisection for the threshold of max(z - t, 0) with sum 1
            t = (low + high) / 2
            low, high = (t, high) if (z - t).clamp(min=0).sum() > 1 else (low, t)
        assert torch.allclose(p, (z - low).clamp(min=0), atol=1e-6)


def test_focus_finds_the_token_used_alike(tmp_path):
    """A new token that stands where an old one stands is made of it; one that the text lacks, of its pieces."""
    import random

    words = ["cat", "dog", "runs", "sleeps", "red", "blue", "stone", "river"]
    rng = random.Random(0)
    animals, things = ["cat", "dog"], ["stone", "river"]
    lines = []
    for _ in range(400):
        lines.append(f"{rng.choice([*animals, '熊猫'])} {rng.choice(['runs', 'sleeps'])}")
        lines.append(f"{rng.choice(things)} {rng.choice(['red', 'blue'])}")
    base = world.sp_model([f" {w}" for w in words] * 20, 330)
    n = SentencePieceProcessor(model_proto=base).vocab_size()
    (tmp_path / "more.model").write_bytes(world.sp_model(["熊猫 熊猫", "未见 未见"] * 20, 290))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    ckpt = world.model(tmp_path / "m", n, world.sp_files(base), hidden=32)
    out = vocab.extend(ckpt, tmp_path / "more.model", init="focus", corpus=tmp_path / "text.txt")
    ours = SentencePieceProcessor(model_proto=out.files["tokenizer.model"].read())
    theirs = SentencePieceProcessor(model_proto=base)
    old, new = world.rows(ckpt).float(), world.rows(out).float()
    row = new[ours.piece_to_id("▁熊猫" if ours.piece_to_id("▁熊猫") >= n else "熊猫")]

    def alike(word):
        ids = theirs.encode(word)
        return torch.cosine_similarity(row, old[ids].mean(0), dim=0).item()

    assert min(map(alike, animals)) > max(map(alike, things)) + 0.2
    unseen = next(i for i in range(n, ours.vocab_size()) if "见" in ours.id_to_piece(i))
    cut = theirs.encode(ours.id_to_piece(unseen).removeprefix("▁"))
    cut = cut if ours.id_to_piece(unseen).startswith("▁") else cut[1:]
    assert torch.allclose(new[unseen], old[cut].mean(0), atol=1e-4)
    llmkit.save(out, tmp_path / "one")
    llmkit.save(
        vocab.extend(ckpt, tmp_path / "more.model", init="focus", corpus=tmp_path / "text.txt"), tmp_path / "two"
    )
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    with pytest.raises(RequirementError, match="none is given") as caught:
        vocab.extend(ckpt, tmp_path / "more.model", init="focus")
    assert "--corpus FILE" in caught.value.hint
