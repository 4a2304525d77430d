"""`--backend vllm`: vLLM's Python API, in this process.

Single-token choices are read from one request a prompt where this vLLM takes `logprob_token_ids` (prefixes are shared
by its cache); everything else from `prompt_logprobs`, for which vLLM computes each sequence whole.

Source: vllm/entrypoints/llm.py, vllm/sampling_params.py, vllm/outputs.py.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError, RequirementError, in_a_line
from llmkit.evaluation.encoding import Encoder
from llmkit.evaluation.engine import EngineKind, EngineOptions
from llmkit.evaluation.engines.served import Scored, ServedEngine, ServedScore
from llmkit.evaluation.generation import Request
from llmkit.evaluation.prefix import Tokens
from llmkit.pipeline.progress import Progress

_MOST_IDS = 128  # that `logprob_token_ids` takes


class VllmEngine(ServedEngine):
    """A model that vLLM has loaded.

    Args:
        model: a `vllm.LLM`.
        sampling_params: `vllm.SamplingParams`.
        dtype: what it computes in.
        progress: told of tokens and answers as they come.
    """

    backend = "vllm"
    device = "vllm"
    batch = 1024

    def __init__(self, model: Any, sampling_params: Any, dtype: str, progress: Progress) -> None:
        super().__init__(progress)
        self._model, self._params, self._dtype = model, sampling_params, dtype
        self._takes_ids = "logprob_token_ids" in inspect.signature(sampling_params).parameters

    @property
    def runtime(self) -> Mapping[str, Any]:
        """The version of vLLM."""
        try:
            version = importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        return {"vllm": version, "dtype": self._dtype}

    def logprobs(self, sequences: Sequence[Scored]) -> list[list[ServedScore]]:
        """The scores of each sequence's targets.

        Raises:
            InputError: vLLM refuses a sequence, or returns no log-probabilities of it.
        """
        single = [s for s in sequences if s.n_targets == 1 and len(s.tokens) > 1 and self._takes_ids]
        scores = self._next_tokens(single)
        whole = [s for s in sequences if s not in scores]
        options = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1, "detokenize": False}
        outputs = self._run([s.tokens for s in whole], [self._params(**options)] * len(whole))
        for sequence, output in zip(whole, outputs, strict=True):
            held = output.prompt_logprobs
            if held is None or len(held) != len(sequence.tokens):
                raise InputError(
                    f"vLLM returned log-probabilities of {len(held or ())} of {len(sequence.tokens)} tokens of a prompt"
                )
            places = range(len(sequence.tokens) - sequence.n_targets, len(sequence.tokens))
            scores[sequence] = [_score(held[i][sequence.tokens[i]]) for i in places]
        return [scores[s] for s in sequences]

    def _next_tokens(self, sequences: Sequence[Scored]) -> dict[Scored, list[ServedScore]]:
        """Sequences of which the last token alone is scored: one request for all that differ in nothing else."""
        asked: dict[Tokens, list[Scored]] = {}
        for sequence in sequences:
            asked.setdefault(sequence.tokens[:-1], []).append(sequence)
        asked = {prompt: some for prompt, some in asked.items() if len(some) <= _MOST_IDS}
        params = [
            self._params(
                max_tokens=1, temperature=0.0, logprob_token_ids=[s.tokens[-1] for s in some], detokenize=False
            )
            for some in asked.values()
        ]
        scores = {}
        for some, output in zip(asked.values(), self._run(list(asked), params), strict=True):
            (completion,) = output.outputs
            chosen = completion.token_ids[0]
            for sequence in some:
                found = completion.logprobs[0][sequence.tokens[-1]]
                scores[sequence] = [(float(found.logprob), sequence.tokens[-1] == chosen)]
        return scores

    def texts(self, requests: Sequence[Request], encoder: Encoder, eos_ids: Sequence[int]) -> list[str]:
        """The continuation of each prompt."""
        params = [
            self._params(
                max_tokens=r.max_new,
                temperature=r.sampling.temperature,
                top_k=r.sampling.top_k or 0,
                top_p=r.sampling.top_p or 1.0,
                seed=r.sampling.seed,
                repetition_penalty=r.sampling.repetition_penalty,
                stop=list(r.stops),
                stop_token_ids=list(eos_ids),
            )
            for r in requests
        ]
        outputs = self._run([r.tokens for r in requests], params)
        eos = frozenset(eos_ids)
        return [encoder.decode([t for t in o.outputs[0].token_ids if t not in eos]) for o in outputs]

    def _run(self, prompts: Sequence[Tokens], params: list[Any]) -> list[Any]:
        if not prompts:
            return []
        asked = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
        try:
            outputs: list[Any] = self._model.generate(asked, params, use_tqdm=False)
        except ValueError as error:  # vLLM's word for prompts that it does not take
            raise InputError(f"vLLM: {in_a_line(error)}", hint="give a lower --max-length") from error
        return outputs


def _score(held: Any) -> ServedScore:
    return float(held.logprob), held.rank == 1


def _open(ckpt: Checkpoint, options: EngineOptions) -> VllmEngine:
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise RequirementError(
            f"--backend vllm needs vLLM, which cannot be imported ({error})", hint="pip install vllm"
        ) from error
    if ckpt.origin is None or not ckpt.origin.is_dir():
        raise InputError(
            f"{ckpt.label}: vLLM reads a model from a folder", hint=f"llmkit convert {ckpt.label} --to hf -o OUT"
        )
    model = vllm.LLM(model=str(ckpt.origin), dtype=options.dtype, enable_prefix_caching=True, seed=0)
    return VllmEngine(model, vllm.SamplingParams, options.dtype, options.progress)


ENGINE = EngineKind(_open, takes=frozenset({"dtype"}))
