"""Engines that are handed whole sequences, against llmkit's own decoder: the same choices and log-probabilities."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from completions_server import Completions, serving
from lm_eval.api.instance import Instance

from llmkit.checkpoint.checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import end_tokens, load_tokenizer
from llmkit.decoder import load_decoder
from llmkit.decoder.generate import generate
from llmkit.errors import InputError, RequirementError
from llmkit.evaluation.engine import EngineOptions
from llmkit.evaluation.engines.openai import OpenAIEngine
from llmkit.evaluation.runner import make_lm
from llmkit.pipeline.progress import NO_PROGRESS
from tests.evaluation.running import evaluate

STEM = "The following are multiple choice questions about small things.\n\n"


def asked(kind, argument_list):
    return [Instance(kind, {}, arguments, i, ("t", i, 1)) for i, arguments in enumerate(argument_list)]


CHOICES = asked(
    "loglikelihood", [(f"{STEM}{q}", f" {c}") for q in ("Which?", "What?") for c in ("B", "of", "apple", "8")]
)
LONGER = asked("loglikelihood", [("Which of these is a fruit?", " apple river"), ("", "stone"), ("a", " apple river")])
ROLLING = asked("loglikelihood_rolling", [(STEM * 3,)])
SPOKEN = asked(
    "generate_until", [(STEM[:n], {"until": ["e", "\n"], "max_gen_toks": 7}) for n in (9, 20, 21)] * 2
) + asked("generate_until", [("apple", {"until": [], "max_gen_toks": 5})])


@pytest.fixture(scope="module")
def served(tiny_llama):
    ckpt = open_checkpoint(tiny_llama)
    return Completions(load_decoder(ckpt), load_tokenizer(ckpt), end_tokens(ckpt), ckpt.label)


@pytest.fixture
def server(served):
    served.faults, served.most, served.has_echo = (lambda body: None), 10**9, True
    served.asked.clear()
    served.keys.clear()
    with serving(served) as url:
        yield url


@pytest.fixture
def vllm(monkeypatch, request):
    """A module with the names and signatures of vLLM's that computes with llmkit's decoder."""
    made = types.ModuleType("vllm")
    made.calls = []

    class LLM:
        def __init__(self, model, *, dtype="auto", enable_prefix_caching=None, seed=None, **kwargs):
            made.options = {"dtype": dtype, "enable_prefix_caching": enable_prefix_caching}
            self.ckpt = open_checkpoint(model)
            self.decoder = load_decoder(self.ckpt)

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
            made.calls += sampling_params
            return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

        def one(self, ids, params):
            if len(ids) > 95:
                raise ValueError("The decoder prompt (length 96) is longer than the maximum model length of 96.")
            (new,) = generate(self.decoder, [ids], max_new_tokens=params.max_tokens, eos=params.stop_token_ids or [])
            logs = self.decoder(torch.tensor([ids])).log_softmax(-1)[0]

            def held(line, token):
                rank = int((line > line[token]).sum()) + 1
                return types.SimpleNamespace(logprob=float(line[token]), rank=rank, decoded_token=None)

            prompt = None
            if params.prompt_logprobs is not None:
                prompt = [None] + [{t: held(line, t)} for line, t in zip(logs[:-1], ids[1:], strict=True)]
            wanted = getattr(params, "logprob_token_ids", None) or []
            output = types.SimpleNamespace(token_ids=new, logprobs=[{t: held(logs[-1], t) for t in wanted}])
            return types.SimpleNamespace(prompt_logprobs=prompt, outputs=[output])

    class SamplingParams:
        def __init__(self, *, temperature=1.0, top_p=1.0, top_k=0, seed=None, stop=None, stop_token_ids=None,
                     max_tokens=16, logprobs=None, prompt_logprobs=None, detokenize=True, **newer):  # fmt: skip
            vars(self).update({k: v for k, v in locals().items() if k not in ("self", "newer")}, **newer)

    class NewerSamplingParams(SamplingParams):
        def __init__(self, *, logprob_token_ids=None, **older):
            super().__init__(logprob_token_ids=logprob_token_ids, **older)

    made.LLM = LLM
    made.SamplingParams = NewerSamplingParams if request.param == "newer" else SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", made)
    return made


def agree(theirs, ours):
    for requests in (CHOICES, LONGER):
        for (a, is_a), (b, is_b) in zip(theirs.loglikelihood(requests), ours.loglikelihood(requests), strict=True):
            assert a == pytest.approx(b, abs=1e-4)
            assert is_a == is_b
    assert theirs.loglikelihood_rolling(ROLLING) == pytest.approx(ours.loglikelihood_rolling(ROLLING), abs=1e-3)
    texts = ours.generate_until(SPOKEN)
    assert theirs.generate_until(SPOKEN) == texts
    assert len(set(texts)) > 2


def test_a_completions_server_gives_the_scores_and_texts_of_the_decoder(tiny_llama, served, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    ckpt = open_checkpoint(tiny_llama)
    agree(make_lm(ckpt, EngineOptions(backend="openai", url=server), max_length=90), make_lm(ckpt, max_length=90))
    assert set(served.keys) == {"Bearer sk-secret"}
    first = served.asked[0]
    assert {"echo": True, "logprobs": 1, "model": ckpt.label}.items() <= first.items()
    assert len(first["prompt"]) == len(CHOICES)


@pytest.mark.parametrize("vllm", ["newer", "older"], indirect=True)
def test_vllm_gives_the_scores_and_texts_of_the_decoder(tiny_llama, vllm):
    ckpt = open_checkpoint(tiny_llama)
    theirs = make_lm(ckpt, EngineOptions(backend="vllm"), max_length=90)
    assert vllm.options == {"dtype": "float32", "enable_prefix_caching": True}
    theirs.loglikelihood(CHOICES)
    has_ids = hasattr(vllm.calls[0], "logprob_token_ids")
    assert len(vllm.calls) == (2 if has_ids else len(CHOICES))  # a request for each prompt, or for each choice
    agree(theirs, make_lm(ckpt, max_length=90))
    with pytest.raises(InputError, match=r"vLLM: The decoder prompt .length 96. is longer"):
        make_lm(ckpt, EngineOptions(backend="vllm"), max_length=96).loglikelihood_rolling(
            asked("loglikelihood_rolling", [(STEM * 9,)])
        )


def test_a_run_by_a_server_leaves_the_record_of_any_run_and_no_key(tiny_llama, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    options = {"shots": 1, "limit": 2, "subjects": ["star_lore"], "max_length": 90}
    record = evaluate(tiny_llama, "mini", backend="openai", url=server, keep=tmp_path / "run.json.answers", **options)
    ours = evaluate(tiny_llama, "mini", **options)
    chosen = [[q.choice for q in r.benches["mini"].subjects[0].questions] for r in (record, ours)]
    assert chosen[0] == chosen[1]
    assert record.scores == ours.scores
    written = json.dumps(record.to_json()) + (tmp_path / "run.json.answers").read_text()
    assert "secret" not in written
    assert record.model["backend"] == "openai"
    assert record.model["url"] == server


def test_a_server_needs_the_tokenizer_here_and_no_weights(tiny_llama, server, tmp_path):
    options = {"shots": 1, "limit": 2, "subjects": ["star_lore"], "max_length": 90}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text("{}")  # what `hf download --include '*.json'` leaves
    record = evaluate(tmp_path, "mini", backend="openai", url=f"{server}#{tiny_llama.name}", **options)
    assert record.scores == evaluate(tiny_llama, "mini", **options).scores
    assert record.model["nbytes"] is None
    with pytest.raises(InputError, match="no usable weight_map"):
        evaluate(tmp_path, "mini", **options)


def test_a_wrong_address_is_found_before_the_data_are_read(tiny_llama, server, tmp_path):
    with pytest.raises(InputError, match="is no address"):
        evaluate(tiny_llama, "mmlu", data=tmp_path / "none", backend="openai", url="localhost:8000")
    with pytest.raises(InputError, match="refused: 404"):
        evaluate(tiny_llama, "mmlu", data=tmp_path / "none", backend="openai", url=f"{server}/elsewhere")
    with pytest.raises(InputError, match="has no model 'tiny-lama'; it serves tiny-llama") as caught:
        evaluate(tiny_llama, "mmlu", data=tmp_path / "none", backend="openai", url=f"{server}#tiny-lama")
    assert caught.value.hint.startswith(f"did you mean --url {server}#tiny-llama")


def test_what_was_scored_before_the_server_died_is_not_asked_again(tiny_llama, served, server, tmp_path, monkeypatch):
    monkeypatch.setattr(OpenAIEngine, "batch", 4)
    options = {"shots": 0, "limit": 3, "subjects": ["star_lore"], "backend": "openai", "url": server}
    keep = tmp_path / "run.json.answers"
    served.faults = lambda body: (404, {"error": {"message": "gone"}}) if len(served.asked) > 1 else None
    with pytest.raises(InputError, match="refused: 404 gone"):
        evaluate(tiny_llama, "mini", keep=keep, **options)
    served.faults = lambda body: None
    record = evaluate(tiny_llama, "mini", keep=keep, **options)
    assert record.n_reused >= 4
    first, after = served.asked[0]["prompt"], [p for body in served.asked[2:] for p in body["prompt"]]
    assert len(first) == 4
    assert not [p for p in after if p in first]


def test_passing_troubles_are_tried_again_and_lasting_ones_said(tiny_llama, served, server):
    waits = []
    engine = OpenAIEngine(server, "x", NO_PROGRESS, wait=waits.append)
    served.faults = lambda body: (503, {"error": "busy"}) if len(served.asked) < 3 else None
    assert len(engine._choices({"prompt": [[5, 6]], "max_tokens": 1}, 1)) == 1
    assert waits == [0.5, 1.0]
    served.faults = lambda body: (429, {"error": {"message": "slow\ndown"}})
    with pytest.raises(InputError, match="did not answer in 5 tries: 429 slow down"):
        engine._choices({"prompt": [[5, 6]], "max_tokens": 1}, 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"has_echo": False}, "returns no log-probabilities of the prompt"),
        ({"most": 9}, r"scored 9 tokens of a prompt of \d+: it cuts prompts or adds tokens"),
        ({"faults": lambda body: (401, {"error": {"message": "who?"}})}, "refused: 401 who"),
        ({"faults": lambda body: (200, {"choices": []})}, "answered 0 of 8 prompts"),
        ({"faults": lambda body: (200, ["?"])}, "answers with list"),
    ],
)
def test_a_server_that_cannot_score_is_refused(tiny_llama, served, server, fault, message):
    for name, value in fault.items():
        setattr(served, name, value)
    with pytest.raises(InputError, match=message):
        make_lm(open_checkpoint(tiny_llama), EngineOptions(backend="openai", url=server)).loglikelihood(CHOICES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "openai"}, "needs the server's address"),
        ({"backend": "openai", "url": "localhost:8000"}, "is no address"),
        ({"backend": "openai", "url": "http://me:word@localhost:8000"}, "holds a name or a password"),
        (
            {"backend": "openai", "url": "http://127.0.0.1:9", "dtype": "bfloat16"},
            "--dtype is not for --backend openai",
        ),
        ({"url": "http://127.0.0.1:9"}, "--url is not for --backend auto"),
        ({"backend": "vllm", "device": "cuda"}, "--device is not for --backend vllm"),
        ({"backend": "vlm"}, "--backend 'vlm' is unknown; expected auto, llmkit, transformers, onnx, openai, vllm"),
    ],
)
def test_options_that_an_engine_does_not_have(tiny_llama, options, message):
    with pytest.raises(InputError, match=message):
        make_lm(open_checkpoint(tiny_llama), EngineOptions(**options))


def test_vllm_that_is_not_installed_is_one_line(tiny_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RequirementError, match="needs vLLM") as caught:
        make_lm(open_checkpoint(tiny_llama), EngineOptions(backend="vllm"))
    assert caught.value.hint == "pip install vllm"
