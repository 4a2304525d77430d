"""Every transform, and eval, on every family: what comes out is the family's, or the transform refuses it by name."""

from __future__ import annotations

import json

import family_world as world
import pytest
import torch
import transformers
from family_world import CASES, IDS, VOCAB, loaded
from rotation import EVERY_WAY, rotated

from llmkit.api import save
from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.quantized import dequantized
from llmkit.decoder.contract import random_ids
from llmkit.decoder.load import load_decoder
from llmkit.errors import RequirementError
from llmkit.evaluation.engine import EngineOptions
from llmkit.evaluation.runner import make_lm
from llmkit.inspection.comparison import compare
from llmkit.transforms.delta.transform import apply, make
from llmkit.transforms.lora import extract, merge, open_adapter
from llmkit.transforms.quantize import quantize
from llmkit.transforms.vocab.extend import extend
from llmkit.transforms.vocab.trim import trim

ROWS = ("embed.weight", "beside.table.weight")
TRANSPOSED = {"gpt2"}
# transformers joins convolutions when it reads files, and drops them beside packed integers.
JOINED = {"kimi_linear"}
APART = {"llama4"}  # experts in stacks, of which transformers makes linear layers where a model is quantized

every_family = pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
IN_TRANSFORMERS = [
    c for c in CASES if c[0] not in TRANSPOSED and world.is_in_transformers(world.ARCHITECTURES[c[0]].tiny)
]


def one_way(way, *others):
    """What is made of names and shapes alike for all families: of most, one of the ways."""
    cases = [case for case, chosen in rotated(CASES, sorted({way, *others})) if chosen == way]
    return pytest.mark.parametrize(("name", "variant"), cases, ids=lambda value: value or "tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The base model of a case, written once."""
    made = {}

    def folder(name, variant):
        if (name, variant) not in made:
            made[name, variant] = world.written(tmp_path_factory.mktemp("base") / "m", name, variant)
        return made[name, variant]

    return folder


@pytest.fixture
def base(folders, name, variant):
    return open_checkpoint(folders(name, variant))


def logits(ckpt, ids):
    return load_decoder(ckpt)(ids)


def closeness(found, expected):
    return float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))


@one_way("delta", "extracted")
def test_a_delta_gives_the_tuned_model_back(tmp_path, base, name, variant):
    tuned = world.moved(base, tmp_path / "tuned")
    assert {d.name for d in compare(base, tuned).differences if d.n_changed} == set(base.tensors)
    save(make(base, tuned), tmp_path / "delta")
    save(apply(base, open_checkpoint(tmp_path / "delta")), tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    same = compare(tuned, back)
    assert (same.removed, same.added, same.reshaped, same.beyond(0.0)) == ((), (), {}, [])
    assert {k: v for k, v in back.config.items() if k != "torch_dtype"} == {**tuned.config}
    ids = random_ids(world.ARCHITECTURES[name], base.config)
    assert torch.equal(logits(back, ids), logits(tuned, ids))


@every_family
def test_an_adapter_on_every_linear_layer_is_merged(tmp_path, folders, base, name, variant):
    layers = world.adapted_layers_of(base)
    assert layers
    if world.is_known_to_peft(base):
        model = world.by_transformers(folders(name, variant), "eager")
        world.peft_adapter(model, tmp_path / "adapter", layers, transposed=name in TRANSPOSED)
        expected = loaded(world.peft_merged(model, tmp_path / "adapter", tmp_path / "merged"))
    else:
        expected = loaded(base) | world.adapter_by_hand(base, tmp_path / "adapter", layers)
    save(merge(base, [open_adapter(tmp_path / "adapter")]), tmp_path / "ours")
    found = loaded(open_checkpoint(tmp_path / "ours"))
    assert set(found) == set(expected)
    for tensor, value in found.items():
        torch.testing.assert_close(value, expected[tensor], atol=2e-6, rtol=0)
    changed = {n.removesuffix(".weight") for n, t in base.tensors.items() if not torch.equal(t.load(), found[n])}
    assert changed == set(layers)


@one_way("extracted", "delta")
def test_an_adapter_is_extracted_and_gives_the_tuned_model(tmp_path, folders, base, name, variant):
    tuned = world.moved(base, tmp_path / "tuned", only=world.adapted_layers_of(base))
    save(extract(base, tuned, rank=1000), tmp_path / "adapter")
    merged = loaded(merge(base, [open_adapter(tmp_path / "adapter")]))
    for tensor, value in loaded(tuned).items():
        torch.testing.assert_close(merged[tensor], value, atol=2e-6, rtol=0)
    if world.is_known_to_peft(base):
        attention = world.ARCHITECTURES[name].reference_attention
        live = world.peft_model(world.by_transformers(folders(name, variant), attention), tmp_path / "adapter")
        ids = random_ids(world.ARCHITECTURES[name], base.config)
        with torch.no_grad():
            assert closeness(logits(tuned, ids), live(ids).logits) <= 2e-5


@pytest.mark.parametrize(
    ("name", "variant", "bits"),
    [
        (*case, bits)
        for i, (case, bits) in enumerate(rotated(CASES, [8, 4]))
        if i % 3 == 0 or case not in IN_TRANSFORMERS or case[0] in EVERY_WAY | APART
    ],
    ids=lambda x: str(x or "tiny"),
)
def test_quantized_and_reloaded(tmp_path, base, name, variant, bits):
    """Of every third family that transformers has: it computes what we do with all of them, below."""
    if name in TRANSPOSED:
        with pytest.raises(
            RequirementError, match=r"h\.0\.attn\.c_attn\.weight and 7 more are stored as \[in, out\]"
        ) as no:
            quantize(base, bits=bits, group_size="channel")
        assert no.value.hint == (
            "--format gptq or bitsandbytes (convert: --to), whose loaders make linear layers of them; or a float "
            "dtype of half the size: llmkit convert MODEL --to hf --dtype bfloat16 -o OUT"
        )
        return
    save(quantize(base, bits=bits, group_size="channel", method="rtn"), tmp_path / "q")
    reloaded = open_checkpoint(tmp_path / "q")
    restored = loaded(dequantized(reloaded))
    for tensor, weight in loaded(base).items():
        if name in APART and weight.ndim == 3:
            expert = f"{tensor.rpartition('.')[0]}.0.{'down' if 'down' in tensor else 'gate'}_proj.weight"
            assert f"{expert}_packed" in reloaded.tensors
            step = 2 * weight.abs().amax(1, keepdim=True) / (2**bits - 1)  # [experts, in, out]
            assert ((restored[tensor] - weight).abs() <= step * 0.5001).all()
            continue
        if tensor.removesuffix(".weight") not in world.layers_of(base):
            assert torch.equal(restored[tensor], weight)
            continue
        step = 2 * weight.abs().amax(1, keepdim=True) / (2**bits - 1)
        assert f"{tensor}_packed" in reloaded.tensors
        assert ((restored[tensor] - weight).abs() <= step * 0.5001).all()
    ids = random_ids(world.ARCHITECTURES[name], base.config)
    ours, before = logits(reloaded, ids), logits(base, ids)
    relative = float((ours - before).norm() / before.norm())
    bound = 0.3 if world.has_experts(base) else 0.15  # a token may go to another expert
    assert 0 < relative < (bound if bits == 8 else 1.5)


@pytest.mark.parametrize(
    ("name", "variant", "bits", "symmetric"),
    [(*case, *way) for case, way in rotated(IN_TRANSFORMERS, [(8, True), (4, False), (8, False), (4, True)])],
    ids=lambda value: str(value) if value is not None else "tiny",
)
def test_transformers_computes_what_we_do_with_quantized_weights(tmp_path, base, name, variant, bits, symmetric):
    save(quantize(base, bits=bits, symmetric=symmetric, group_size="channel", method="rtn"), tmp_path / "q")
    if not transformers.__version__.startswith("4.") and (
        (not symmetric and world.has_experts(base)) or name in JOINED
    ):
        # transformers 5 stacks experts, and does not collect their zero points for it.
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            world.by_transformers(tmp_path / "q", world.ARCHITECTURES[name].reference_attention)
        if name not in JOINED:
            return
        # Beside float8 it keeps what has no scales.
        save(quantize(base, bits=8, type="fp8"), tmp_path / "q", overwrite=True)
    model = world.by_transformers(tmp_path / "q", world.ARCHITECTURES[name].reference_attention)
    ids = random_ids(world.ARCHITECTURES[name], base.config)
    with torch.no_grad():
        assert closeness(logits(open_checkpoint(tmp_path / "q"), ids), model(ids).logits) <= 1e-5


@one_way("added", "taken out")
def test_tokens_are_added(tmp_path, base, name, variant):
    (tmp_path / "words.txt").write_text("quokka\nzebrafish\naxolotl\n")
    save(extend(base, tmp_path / "words.txt"), tmp_path / "larger")
    larger = open_checkpoint(tmp_path / "larger")
    architecture, n_old = world.ARCHITECTURES[name], len(VOCAB)
    model = architecture.bind(larger.config)
    assert model.dims.vocab == n_old + 3
    with_rows = {s.name for i, s in model.slots.items() if i in ROWS or i.startswith("head.")}
    for tensor, lazy in base.tensors.items():
        old, new = lazy.load(), larger.tensors[tensor].load()
        assert new.shape == ((n_old + 3, *old.shape[1:]) if tensor in with_rows else old.shape)
        assert torch.equal(new[: old.shape[0]] if old.ndim else new, old)
    assert set(larger.tensors) == set(base.tensors)
    ids = random_ids(architecture, base.config)
    found = logits(larger, ids)
    assert closeness(found[..., :n_old], logits(base, ids)) <= 1e-6
    ids[:, 1] = n_old + 2
    assert logits(larger, ids).isfinite().all()


@one_way("taken out", "added")
def test_tokens_are_taken_out(tmp_path, base, name, variant):
    (tmp_path / "corpus.txt").write_text("the other mother bothered her brother there\n")
    save(trim(base, tmp_path / "corpus.txt"), tmp_path / "smaller")
    smaller = open_checkpoint(tmp_path / "smaller")
    kept = json.loads(smaller.files["tokenizer.json"].read())["model"]["vocab"]
    assert 256 <= len(kept) < len(VOCAB)
    old_of = torch.tensor([VOCAB[token] for token, _ in sorted(kept.items(), key=lambda item: item[1])])
    architecture = world.ARCHITECTURES[name]
    assert architecture.bind(smaller.config).dims.vocab == len(kept)
    ids = random_ids(architecture, smaller.config)
    expected = logits(base, old_of[ids])[..., old_of]
    assert closeness(logits(smaller, ids), expected) <= 1e-6
    rows = {n for n in base.tensors if base.tensors[n].shape != smaller.tensors[n].shape}
    assert all(torch.equal(smaller.tensors[n].load(), base.tensors[n].load()) for n in base.tensors if n not in rows)


QUESTIONS = ["which is a fruit? A. stone B. apple Answer:", "the other mother bothered her brother there", "in 1970"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [c for c in CASES if world.is_in_transformers(world.ARCHITECTURES[c[0]].tiny)],
    ids=lambda value: value or "tiny",
)
def test_scores_are_those_of_lm_evals_own_backend(tmp_path, caplog, name, variant):
    """Questions behind a shared stem, longer than the learned positions of some families: cut as lm-eval cuts them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = world.written(tmp_path / "m", name, variant)
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "e", "pad_token": "e", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    stem = "the quick brown fox jumps over the lazy dog. she sells sea shells. "
    asked = [(stem + question, f" {answer}") for question in QUESTIONS for answer in ("A", "B", "the other", "zebra")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i, metadata=("t", i, 1))
        for i, pair in enumerate(asked)
    ]
    ours = make_lm(open_checkpoint(folder), EngineOptions(batch_tokens=200)).loglikelihood(requests)
    caplog.set_level("ERROR")
    model = world.by_transformers(folder, world.ARCHITECTURES[name].reference_attention)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    for (mine, is_mine), (other, is_other) in zip(ours, theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
        assert is_mine == is_other


def test_an_adapter_on_a_head_that_has_another_name_in_memory(tmp_path, folders):
    """GPT-NeoX: files say embed_out, transformers 5 and with it PEFT say lm_head."""
    base = open_checkpoint(folders("gpt_neox", None))
    model = world.by_transformers(folders("gpt_neox", None), "eager")
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    world.peft_adapter(model, tmp_path / "adapter", [head, "query_key_value"], transposed=False)
    expected = loaded(world.peft_merged(model, tmp_path / "adapter", tmp_path / "merged"))
    found = loaded(merge(base, [open_adapter(tmp_path / "adapter")]))
    assert set(found) == set(expected)
    for tensor, value in found.items():
        torch.testing.assert_close(value, expected[tensor], atol=2e-6, rtol=0)
    assert not torch.equal(found["embed_out.weight"], base.tensors["embed_out.weight"].load())


def test_a_file_without_the_prefix_serves_as_base(tmp_path, folders):
    """GPT-2 as its hub files have it: names begin with h.0, those of adapters and tunings with transformer.h.0."""
    from safetensors.torch import load_file, save_file

    whole = open_checkpoint(folders("gpt2", None))
    tuned = world.moved(whole, tmp_path / "tuned")
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / "bare" / file).write_bytes((whole.origin / file).read_bytes())
    stored = load_file(whole.origin / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in stored.items()}, tmp_path / "bare" / "model.safetensors")
    bare = open_checkpoint(tmp_path / "bare")
    save(make(bare, tuned), tmp_path / "delta")
    difference = open_checkpoint(tmp_path / "delta")
    assert compare(tuned, apply(bare, difference)).beyond(0.0) == []
    assert any("'transformer.'" in note for note in apply(bare, difference).notes)
    model = world.by_transformers(tmp_path / "bare", "eager")
    world.peft_adapter(model, tmp_path / "adapter", ["c_attn"], transposed=True)
    assert (
        compare(
            merge(whole, [open_adapter(tmp_path / "adapter")]), merge(bare, [open_adapter(tmp_path / "adapter")])
        ).beyond(0.0)
        == []
    )


def test_the_layer_tells_how_it_is_stored_not_the_adapters_config(tmp_path, folders):
    """PEFT goes by the class of the layer too: it corrects fan_in_fan_out with a warning."""
    base = open_checkpoint(folders("gpt2", None))
    model = world.by_transformers(folders("gpt2", None), "eager")
    world.peft_adapter(model, tmp_path / "adapter", ["c_proj"], transposed=True)  # square: shapes cannot tell
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": False}))
    expected = loaded(world.peft_merged(model, tmp_path / "adapter", tmp_path / "merged"))
    found = loaded(merge(base, [open_adapter(tmp_path / "adapter")]))
    for tensor, value in found.items():
        torch.testing.assert_close(value, expected[tensor], atol=2e-6, rtol=0)
