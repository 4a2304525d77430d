"""What a run would send, without the model: the engine that only looks at its requests.

Protocols and lm-eval's tasks run as ever; nothing else writes prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.evaluation.answers import Answers
from llmkit.evaluation.encoding import Encoder, hash_ids
from llmkit.evaluation.generation import Request
from llmkit.evaluation.prefix import Query
from llmkit.evaluation.scoring import Usage
from llmkit.evaluation.targets import Score

if TYPE_CHECKING:
    from llmkit.evaluation.lm import SharedPrefixLM

Ids = tuple[int, ...]


@dataclass
class PreviewEngine:
    """Keeps what it is asked for, and answers with nothing.

    Attributes:
        asked: hash of a prompt's ids -> the ids, and the continuations to score, in the order of the requests.
        needs: hash -> how many tokens the model has to take for it.
    """

    prompts: dict[str, tuple[Ids, list[Ids]]] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)
    answers: Answers = field(default_factory=Answers)
    usage: Usage = field(default_factory=Usage)
    warnings: list[str] = field(default_factory=list)
    backend: str = "preview"
    device: str = "cpu"
    runtime: Mapping[str, Any] = field(default_factory=dict)

    def score(self, queries: Sequence[Query], label: str = "scoring") -> list[Score]:
        """Zeros."""
        for query in queries:
            ids = query.tokens[: query.first + 1]
            name = hash_ids(ids)
            self.prompts.setdefault(name, (ids, []))[1].append(query.targets)
            self.needs[name] = max(self.needs.get(name, 0), len(query.tokens))
        return [Score(0.0, False, 0.0)] * len(queries)

    def generate(self, requests: Sequence[Request], encoder: Encoder, eos_ids: Sequence[int]) -> list[str]:
        """Empty texts."""
        for request in requests:
            name = hash_ids(request.tokens)
            self.prompts.setdefault(name, (request.tokens, []))
            self.needs[name] = len(request.tokens) + request.max_new
        return [""] * len(requests)

    def sent(self, lm: SharedPrefixLM, bench: str, subject: str, name: str, prompt: str) -> SentPrompt:
        """The prompt with a hash."""
        ids, choices = self.prompts[prompt]
        text = lm.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return SentPrompt(bench, subject, name, prompt, ids, str(text), tuple(dict.fromkeys(choices)))


@dataclass(frozen=True)
class SentPrompt:
    """One question as it is sent.

    Attributes:
        bench, subject, id: which question.
        prompt: the hash that the record has of the ids.
        ids: token ids; the answer begins after the last.
        text: those ids as text.
        choices: the ids of each choice that is scored there; empty where text is generated.
    """

    bench: str
    subject: str
    id: str
    prompt: str
    ids: Ids
    text: str
    choices: tuple[Ids, ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "bench": self.bench,
            "subject": self.subject,
            "id": self.id,
            "prompt": self.prompt,
            "answer_at": len(self.ids),
            "ids": list(self.ids),
            "choices": [list(ids) for ids in self.choices],
            "text": self.text,
        }
