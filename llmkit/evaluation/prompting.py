"""Protocols with prompts of their own: from documents to prompts, and from a model's answers to questions of a record.

All prompts of a benchmark go to the model in one call, so that what they begin with is computed once.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, exp, fsum, log
from typing import TYPE_CHECKING, Any

from llmkit.decoder.sampling import Sampling
from llmkit.errors import InputError
from llmkit.evaluation.benches import Subject
from llmkit.evaluation.documents import LETTERS, question_and_choices
from llmkit.evaluation.encoding import hash_ids
from llmkit.evaluation.generation import Request
from llmkit.evaluation.identity import digest_of
from llmkit.evaluation.meter import Meter
from llmkit.evaluation.prefix import Query
from llmkit.evaluation.protocol import Documents, Plan, Protocol, Samples, Workload
from llmkit.evaluation.record import BenchResult, Question, SubjectResult
from llmkit.evaluation.statistics import mean

if TYPE_CHECKING:
    from llmkit.evaluation.lm import SharedPrefixLM
    from llmkit.evaluation.targets import Score

GREEDY = Sampling(temperature=0.0)

Ids = tuple[int, ...]
Options = Sequence[Sequence[Ids]]
"""The token sequences that count as each choice; their probabilities are added."""


@dataclass(frozen=True, slots=True)
class Item:
    """One multiple-choice question, every text exactly as in the data.

    Attributes:
        answer: the right letter; empty where it is not published.
        explanation: how one gets to it; empty where there is none.
    """

    question: str
    choices: tuple[str, ...]
    answer: str
    explanation: str = ""

    @property
    def text(self) -> str:
        """The question, and below it a line `A. …` for each choice."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, *lines])


@dataclass(frozen=True, slots=True)
class Case:
    """An item that is put to the model.

    Attributes:
        id: of the record's `Question`: the row in the file.
        shots: examples from the same subject, in order of their file.
    """

    subject: Subject
    id: str
    item: Item
    shots: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What is sent.

    Attributes:
        text: as the protocol writes it; tokens of a chat format are marks in it (`llmkit.tokenization.chat`).
        ids: what the model reads; the longest input of the model has lost its beginning.
    """

    text: str
    ids: Ids

    @cached_property
    def hash(self) -> str:
        """As of the record's `Question.prompt`."""
        return hash_ids(self.ids)


Value = Callable[[Prompt, Sequence[Ids], Sequence["Score"]], float]
"""How good a choice is: of the prompt, the token sequences that count as the choice, and their scores."""


@dataclass
class Session:
    """A model as protocols use it.

    Attributes:
        lm: encodes, and has the engine.
        logged: of each question by (subject, id), what `--log-samples` keeps.
        letter_ids: letter -> the token sequences that count as it, after the first prompt.
        n_fewer_shots: prompts that have fewer shots than were asked for, so that they fit.
    """

    lm: SharedPrefixLM
    logged: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    letter_ids: dict[str, list[Ids]] = field(default_factory=dict)
    n_fewer_shots: int = 0

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        return self.lm.max_length

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""
        return self.lm.tokenizer

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[Ids]:
        """Token ids of each text, with what the tokenizer puts around a text unless `special` is False."""
        encoded = self.lm.encoder.encode(texts, None if special else False)
        return [tuple(ids) for ids in encoded]

    def token_id(self, name: str) -> int:
        """The vocabulary's entry of that name; that of the unknown token where it has none."""
        found = self.tokenizer.convert_tokens_to_ids(name)
        return int(found if found is not None else -1)

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation (role, content) in the chat format of the run, up to where the answer begins.

        The system message stands in front of the first question where the format has no place for it.
        """
        return self.lm.apply_chat_template([dict(m) for m in messages], keeps_system=True)

    def prompts(self, texts: Sequence[str], *, max_new: int = 0) -> list[Prompt]:
        """Texts as prompts; those that do not fit in the model's context lose their beginning, and are counted.

        Args:
            max_new: of `generate`; room for as many tokens is left.
        """
        return [self._prompt(text, ids, max_new) for text, ids in zip(texts, self.encode(texts), strict=True)]

    def prompts_and_options(
        self, texts: Sequence[str], continuations: Sequence[Sequence[str]]
    ) -> tuple[list[Prompt], list[Options]]:
        """Prompts, and for each continuation the tokens that it adds when both are encoded together."""
        encoded = self.lm.encoder.encode_choices(texts, continuations)
        prompts = [self._prompt(text, tuple(head)) for text, (head, _) in zip(texts, encoded, strict=True)]
        return prompts, [[[tuple(ids)] for ids in tails] for _, tails in encoded]

    def _prompt(self, text: str, ids: Ids, max_new: int = 0) -> Prompt:
        room = self.max_length - max_new
        if room < 1:
            raise InputError(f"answers of {max_new} tokens are asked for, but the model takes {self.max_length} in all")
        self.lm.n_truncated += len(ids) > room
        return Prompt(text, ids[-room:])

    def scores(self, prompts: Sequence[Prompt], options: Sequence[Options]) -> list[list[list[Score]]]:
        """By prompt, choice and token sequence."""
        queries = []
        for prompt, choices in zip(prompts, options, strict=True):
            for ids in (ids for sequences in choices for ids in sequences):
                queries.append(Query((prompt.ids + ids)[-(self.max_length + 1) :][:-1], ids))
        scores = iter(self.lm.scorer.score(queries))
        return [[[next(scores) for _ in sequences] for sequences in choices] for choices in options]

    def generate(
        self, prompts: Sequence[Prompt], *, max_new: int, stops: Sequence[str] = (), sampling: Sampling = GREEDY
    ) -> list[str]:
        """What the model goes on with, up to a stop string, an end token or `max_new` tokens."""
        all_stops = (*stops, *self.lm.stops, self.lm.encoder.eos_text)
        requests = [Request(i, p.ids, all_stops, max_new, sampling) for i, p in enumerate(prompts)]
        return self.lm.scorer.generate(requests, self.lm.encoder, self.lm.eos_ids)

    def choose(
        self, cases: Sequence[Case], prompts: Sequence[Prompt], options: Sequence[Options], value: Value | None = None
    ) -> list[Question]:
        """The most probable choice of each; the first of equals, as numpy's argmax has it.

        Args:
            value: what decides in place of the probability.
        """
        questions = []
        for case, prompt, choices, scores in zip(cases, prompts, options, self.scores(prompts, options), strict=True):
            logprobs = tuple(add_probabilities([s.logprob for s in sequences]) for sequences in scores)
            values = logprobs if value is None else [value(prompt, *both) for both in zip(choices, scores, strict=True)]
            letter = LETTERS[values.index(max(values))]
            questions.append(
                Question(case.id, letter, case.item.answer, logprobs, probability_mass(choices, logprobs), prompt.hash)
            )
            self.letter_ids = self.letter_ids or dict(zip(LETTERS, map(list, choices), strict=False))
            responses = [[x, any(s.is_greedy for s in some)] for x, some in zip(values, scores, strict=True)]
            self._log(case, prompt, responses, continuations=list(LETTERS[: len(choices)]))
        return questions

    def take(
        self, cases: Sequence[Case], prompts: Sequence[Prompt], texts: Sequence[str], choices: Sequence[str]
    ) -> list[Question]:
        """Choices that were read in generated texts; an empty one could not be read."""
        for case, prompt, text in zip(cases, prompts, texts, strict=True):
            self._log(case, prompt, [text])
        return [
            Question(case.id, choice, case.item.answer, prompt=prompt.hash)
            for case, prompt, choice in zip(cases, prompts, choices, strict=True)
        ]

    def _log(self, case: Case, prompt: Prompt, responses: Sequence[Any], **more: Any) -> None:
        text = prompt.text.encode("utf-8", "backslashreplace")
        self.logged[case.subject.name, case.id] = {
            "target": case.item.answer,
            "prompt": prompt.text,
            "prompt_ids": list(prompt.ids),
            "prompt_sha256": hashlib.sha256(text).hexdigest(),
            "responses": list(responses),
            **more,
        }


class Prompting(Protocol):
    """A protocol with prompts of its own.

    Attributes:
        has_chat: its authors say how the prompt is put in a chat format.
    """

    has_chat: bool = False

    @abstractmethod
    def answer(self, session: Session, cases: Sequence[Case], *, chat: bool) -> list[Question]:
        """The answers to all cases of a benchmark, in their order.

        Args:
            chat: prompts are to be put in the run's chat format; only where the protocol `has_chat`.
        """

    def plan(self, work: Workload) -> Plan:
        """The items of all subjects."""
        if work.chat and not self.has_chat:
            raise InputError(
                f"--protocol {self.name}: its authors define no chat format for it",
                hint="leave --chat and --chat-template out, or take --protocol lm-eval",
            )
        docs = {subject: _documents(work, subject) for subject in work.docs}
        return Plan(docs, lambda lm, subjects: self._score(lm, work, {s: docs[s] for s in subjects}))

    def _score(self, lm: SharedPrefixLM, work: Workload, docs: Mapping[str, Documents]) -> tuple[BenchResult, Samples]:
        meter = Meter(lm)
        cases = [case for subject, some in docs.items() for case in _cases(work, subject, some)]
        session = Session(lm)
        by_subject: dict[Subject, list[Question]] = {}
        for case, question in zip(cases, self.answer(session, cases, chat=work.chat), strict=True):
            by_subject.setdefault(case.subject, []).append(question)
        logged: Samples = {}
        for subject, questions in by_subject.items():
            documents = docs[subject.name].scored
            logged[work.bench.task_name(subject.name)] = [
                {"doc_id": int(q.id), "doc": dict(documents[int(q.id)]), "acc": float(q.is_right)}
                | session.logged.get((subject.name, q.id), {})
                for q in questions
            ]
        result = BenchResult(
            bench=work.bench,
            subjects=tuple(
                SubjectResult(subject, mean([float(q.is_right) for q in questions]), tuple(questions))
                for subject, questions in by_subject.items()
            ),
            missing=work.missing,
            shots=work.shots,
            n_truncated=meter.n_truncated,
            task_version="",
            task_digest=digest_of([work.bench.name, self.name, work.shots, work.chat]),
            elapsed_s=meter.elapsed_s,
            tokens=meter.tokens,
            protocol=self.name,
            average=self.average,
            letter_ids=session.letter_ids,
            n_fewer_shots=session.n_fewer_shots,
        )
        return result, logged


def add_probabilities(logprobs: Sequence[float]) -> float:
    """The log of the sum of probabilities given as logs."""
    highest = max(logprobs)
    return highest if len(logprobs) == 1 else highest + log(fsum(exp(x - highest) for x in logprobs))


def probability_mass(options: Options, logprobs: Sequence[float]) -> float | None:
    """The probability of all choices together; None where they are not different single tokens of one place."""
    sequences = [ids for choice in options for ids in choice]
    if len(set(sequences)) < len(sequences) or any(len(ids) != 1 for ids in sequences):
        return None
    return fsum(exp(x) for x in logprobs)


def single_tokens(ids: Sequence[int], protocol: str) -> Options:
    """Choices that are one token each.

    Raises:
        InputError: two of them are the same token: the tokenizer has no letters of the kind that the protocol reads.
    """
    if len(set(ids)) < len(ids):
        raise InputError(
            f"--protocol {protocol} reads each letter from one token, but for this tokenizer the letters are the "
            f"tokens {', '.join(map(str, ids))}",
            hint="take --protocol lm-eval, which scores letters of several tokens",
        )
    return [[(i,)] for i in ids]


def drop_last_shots(
    session: Session, cases: Sequence[Case], write: Callable[[Case, int], str], max_length: int
) -> list[str]:
    """The text of each case with as many of its first shots as fit in `max_length` tokens.

    Args:
        write: (case, number of shots) -> text.
    """
    shots = [len(case.shots) for case in cases]
    texts = [write(case, k) for case, k in zip(cases, shots, strict=True)]
    pending = list(range(len(cases)))
    while pending:
        lengths = [len(ids) for ids in session.encode([texts[i] for i in pending])]
        pending = [i for i, n in zip(pending, lengths, strict=True) if n > max_length and shots[i]]
        for i in pending:
            shots[i] -= 1
            texts[i] = write(cases[i], shots[i])
    session.n_fewer_shots += sum(k < len(case.shots) for case, k in zip(cases, shots, strict=True))
    return texts


def _documents(work: Workload, subject: str) -> Documents:
    bench, docs = work.bench, work.docs[subject]
    if docs is None:
        from llmkit.evaluation.tasks import bench_task

        dataset = bench_task(bench, subject, None).dataset
        docs = {split: list(dataset[bench.splits[split]]) for split in {bench.split, bench.shots_split}}
    return Documents(docs[bench.split], docs.get(bench.shots_split, [])[: work.shots])


def _cases(work: Workload, subject: str, docs: Documents) -> list[Case]:
    n = len(docs.scored)
    limit = n if work.limit is None else ceil(n * work.limit) if work.limit < 1 else int(work.limit)
    shots = tuple(map(_item, docs.shots))
    known = work.bench.by_name.get(subject, Subject(subject))
    return [Case(known, str(i), _item(doc), shots) for i, doc in enumerate(docs.scored[:limit])]


def _item(doc: Mapping[str, Any]) -> Item:
    question, choices = question_and_choices(doc)
    lowered = {str(k).lower(): v for k, v in doc.items()}
    answer = lowered.get("answer", "")
    letter = LETTERS[answer] if isinstance(answer, int) and answer >= 0 else "" if answer == -1 else str(answer)
    return Item(question, tuple(choices), letter, str(lowered.get("explanation") or ""))
