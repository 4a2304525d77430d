"""`--backend openai`: an OpenAI-compatible completions server that returns log-probabilities of the prompt.

Prompts go as token ids with `echo` and `logprobs`, so that what is scored are the very ids of every other backend. The
key comes from OPENAI_API_KEY and is written nowhere.

Source: the completions endpoint as vLLM serves it and lm-eval's `local-completions` asks it.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.errors import InputError, listing, suggestion
from llmkit.evaluation.encoding import Encoder
from llmkit.evaluation.engine import EngineKind, EngineOptions
from llmkit.evaluation.engines.served import Scored, ServedEngine, ServedScore
from llmkit.evaluation.generation import Request
from llmkit.pipeline.progress import Progress

_AT_ONCE = 4  # requests under way
_PROMPTS = 16  # prompts of one request
_STOPS = 4  # stop strings that the endpoint takes; answers are cut by all of them here
_TRIES = 5
_FIRST_WAIT_S = 0.5  # doubled with each try
_TIMEOUT_S = 600.0
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}


class _Refused(InputError):
    """A server that is there, and does not answer this."""


class OpenAIEngine(ServedEngine):
    """A server's completions endpoint.

    Args:
        url: `http://host:port/v1`; a fragment (`#name`) names the model where the server has several.
        label: what the user calls the model: the server's, where it has one of that name.
        progress: told of tokens and answers as they come.
        wait: sleeps so many seconds before a failed request is sent again.

    Raises:
        InputError: no server answers, or it has several models and none of that name.
    """

    backend = "openai"
    batch = _AT_ONCE * _PROMPTS

    def __init__(self, url: str, label: str, progress: Progress, wait: Any = time.sleep) -> None:
        super().__init__(progress)
        self._wait = wait
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"--url {url!r} is no address", hint="--url http://localhost:8000/v1")
        if "@" in parts.netloc:
            raise InputError("--url holds a name or a password", hint="give the key in OPENAI_API_KEY")
        path = parts.path.rstrip("/").removesuffix("/completions") or "/v1"
        self._base = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self._model = self._served(label, parts.fragment)

    @property
    def runtime(self) -> Mapping[str, Any]:
        """Where it is served and under which name; the dtype is the server's."""
        return {"url": self._base, "served_model": self._model, "dtype": "as served"}

    def logprobs(self, sequences: Sequence[Scored]) -> list[list[ServedScore]]:
        """The scores of each sequence's targets.

        Raises:
            InputError: the server refuses, truncates, or returns no log-probabilities of the prompt.
        """

        def ask(batch: Sequence[Scored]) -> list[list[ServedScore]]:
            body = {"prompt": [list(s.tokens) for s in batch], "max_tokens": 1, "logprobs": 1, "echo": True}
            choices = self._choices(body | {"temperature": 0}, len(batch))
            return [self._read(choice, s) for choice, s in zip(choices, batch, strict=True)]

        batches = [sequences[i : i + _PROMPTS] for i in range(0, len(sequences), _PROMPTS)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [scores for some in pool.map(ask, batches) for scores in some]

    def texts(self, requests: Sequence[Request], encoder: Encoder, eos_ids: Sequence[int]) -> list[str]:
        """The continuation of each prompt."""

        def ask(batch: Sequence[Request]) -> list[str]:
            first = batch[0]
            body: dict[str, Any] = {
                "prompt": [list(r.tokens) for r in batch],
                "max_tokens": first.max_new,
                "temperature": first.sampling.temperature,
                "top_p": first.sampling.top_p or 1.0,
                "seed": first.sampling.seed,
                "stop": list(first.stops[:_STOPS]),
            }
            if first.sampling.repetition_penalty != 1:  # not OpenAI's own: vLLM, llama.cpp and others take it
                body["repetition_penalty"] = first.sampling.repetition_penalty
            return [str(choice.get("text") or "") for choice in self._choices(body, len(batch))]

        batches = []
        for _, alike in groupby(requests, key=lambda r: (r.kind, r.stops)):
            some = list(alike)
            batches += [some[i : i + _PROMPTS] for i in range(0, len(some), _PROMPTS)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [text for some in pool.map(ask, batches) for text in some]

    def _read(self, choice: Mapping[str, Any], sequence: Scored) -> list[ServedScore]:
        held = choice.get("logprobs") or {}
        values, tops = held.get("token_logprobs") or [], held.get("top_logprobs") or []
        n = len(sequence.tokens)
        if len(values) <= 1 < n or not tops:
            raise InputError(
                f"{self._base} returns no log-probabilities of the prompt (echo with logprobs), which scores need",
                hint="serve the model with vLLM, or score it here: --backend llmkit",
            )
        if len(values) not in (n, n + 1):  # with or without the one new token
            raise InputError(
                f"{self._base} scored {len(values) - 1} tokens of a prompt of {n}: it cuts prompts or adds tokens",
                hint="serve it with a longer context, or give --max-length",
            )
        cut = slice(n - sequence.n_targets, n)
        scores: list[ServedScore] = []
        for value, top in zip(values[cut], tops[cut], strict=True):
            if value is None or not top:
                raise InputError(f"{self._base} returns no log-probability for a token of the prompt")
            scores.append((float(value), float(value) >= max(map(float, top.values()))))
        return scores

    def _served(self, label: str, wanted: str) -> str:
        """The model that is asked: the one `wanted`, else the one called `label`, else the only one."""
        try:
            listed = self._call("models", None).get("data")
        except _Refused:
            if wanted:  # a server without a list of models
                return wanted
            raise
        names = [str(m.get("id")) for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        if wanted and (wanted in names or not names):
            return wanted
        if wanted:
            raise InputError(
                f"{self._base} has no model {wanted!r}; it serves {listing(names)}",
                hint=suggestion(wanted, names, f"--url {self._base}#{names[0]}", f"--url {self._base}#"),
            )
        chosen = [name for name in names if name == label] or names
        if len(chosen) != 1:
            raise InputError(
                f"{self._base} serves {len(names)} models: {listing(names)}",
                hint=f"name one: --url {self._base}#{names[0] if names else 'NAME'}",
            )
        return chosen[0]

    def _choices(self, body: Mapping[str, Any], n: int) -> list[Mapping[str, Any]]:
        reply = self._call("completions", {"model": self._model, **body})
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != n:
            found = len(choices) if isinstance(choices, list) else "none"
            raise InputError(f"{self._base} answered {found} of {n} prompts", hint="is it a completions server?")
        return sorted(choices, key=lambda choice: int(choice.get("index") or 0))

    def _call(self, name: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for left in reversed(range(_TRIES)):
            try:
                request = urllib.request.Request(f"{self._base}/{name}", data, headers)
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                    read = json.loads(reply.read())
                if isinstance(read, dict):
                    return read
                raise InputError(f"{self._base}/{name} answers with {type(read).__name__}, expected an object")
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {_message(error)}".strip()
                if error.code not in _PASSING:
                    raise _Refused(f"{self._base}/{name} refused: {problem}", hint=_hint(error.code)) from error
            except (OSError, HTTPException, ValueError) as error:
                problem = str(getattr(error, "reason", "") or error or type(error).__name__)
            if left:
                self._wait(_FIRST_WAIT_S * 2 ** (_TRIES - 1 - left))
        raise InputError(
            f"{self._base}/{name} did not answer in {_TRIES} tries: {problem}",
            hint="is the server up? What is scored is kept: the same command goes on",
        )


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words, in one line."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
        read = json.loads(text)
        inner = read.get("error", read) if isinstance(read, dict) else read
        text = str(inner.get("message", text)) if isinstance(inner, dict) else text
    except (OSError, ValueError):
        text = str(error.reason)
    return " ".join(text.split())[:300]


def _hint(code: int) -> str | None:
    if code in (401, 403):
        return "export OPENAI_API_KEY=…"
    return "--url http://host:port/v1" if code == 404 else None


def _open(ckpt: Checkpoint, options: EngineOptions) -> OpenAIEngine:
    if options.url is None:
        raise InputError("--backend openai needs the server's address", hint="--url http://localhost:8000/v1")
    return OpenAIEngine(options.url, ckpt.label, options.progress)


ENGINE = EngineKind(_open, takes=frozenset({"url"}), needs_weights=False)
