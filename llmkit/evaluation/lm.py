"""The lm-eval `LM` over llmkit's decoder.

Imported only when something is evaluated: it needs lm-eval at once, as its class is derived from. Encoding, truncation,
windows and chat templates are those of lm-eval's `hf` backend (0.4.13), which the tests hold it against; what differs
is how the scores are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmkit.architecture.prompts import ChatTemplate, Message, Prompt, Turns
from llmkit.errors import InputError
from llmkit.evaluation.encoding import Encoder, hash_ids
from llmkit.evaluation.generation import read_requests
from llmkit.evaluation.prefix import Query
from llmkit.tokenization.chat import ending_of, is_marked, marked_answer_prefix, marked_text
from llmkit.tokenization.templates import TemplateRefusal, render

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from llmkit.evaluation.engine import Engine

DEFAULT_MAX_LENGTH = 2048
_UNSET_LENGTH = 10**18  # tokenizers that know no limit report 1e30
_MAX_CONTINUATIONS = 16  # distinct continuations whose token ids are remembered for the record


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a request.

    Attributes:
        prompt: of the token ids that stood before the answer, as of the record's `Question`.
        targets: the ids of the continuation; empty where an answer was generated.
    """

    prompt: str
    targets: tuple[int, ...] = ()


class SharedPrefixLM(TemplateLM):  # type: ignore[misc]
    """Scores lm-eval's requests with each shared prefix computed once.

    Args:
        scorer: what computes the model.
        tokenizer: a transformers tokenizer.
        max_length: the longest input in tokens; longer ones lose tokens on the left.
        eos_ids: tokens that end a generated text besides the tokenizer's end token.
        prompt: the format that `apply_chat_template` writes; the tokenizer's own chat template when not given.
    """

    backend = "causal"

    def __init__(
        self,
        scorer: Engine,
        tokenizer: Any,
        *,
        max_length: int,
        eos_ids: Sequence[int] = (),
        prompt: Prompt | None = None,
    ) -> None:
        super().__init__()
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_gen_toks = 256
        self.prompt = prompt
        ending = ending_of(tokenizer, prompt or ChatTemplate())
        self.encoder = Encoder(tokenizer, is_templated=isinstance(prompt, ChatTemplate))
        self.eos_ids = sorted({self.encoder.eos_id, *eos_ids, *ending.ids})
        self.stops = ending.texts
        self._lead = marked_answer_prefix(tokenizer, prompt)
        self.n_truncated = 0
        self.n_without_system = 0
        self.continuations: dict[str, tuple[int, ...]] = {}
        self.sent: dict[tuple[str, ...], Sent] = {}
        self._device = scorer.device

    def with_engine(self, engine: Engine, max_length: int | None = None) -> SharedPrefixLM:
        """The same, nothing counted yet, with something else behind it."""
        other = copy(self)
        other.scorer, other._device = engine, engine.device
        other.max_length = max_length or self.max_length
        other.n_truncated = other.n_without_system = 0
        other.continuations, other.sent = {}, {}
        return other

    @property
    def eot_token_id(self) -> int:
        return self.encoder.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.encoder.encode([string], add_special_tokens)[0]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As `TemplateLM` encodes them, but all at once, and each distinct text once."""
        pairs = [(self.with_answer_prefix(str(r.args[0])), str(r.args[1])) for r in requests]
        encoded = self.encoder.encode_pairs(pairs)
        return self._loglikelihood_tokens([(pair, *ids) for pair, ids in zip(pairs, encoded, strict=True)])

    def with_answer_prefix(self, context: str) -> str:
        """A prompt in a format of ours with what its answers begin with: lm-eval puts no space after a chat prompt."""
        return context + self._lead if is_marked(context) else context

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        queries = []
        truncated: set[tuple[int, ...]] = set()
        for texts, context, continuation in requests:
            query = self._query(context, continuation)
            queries.append(query)
            if len(context) + len(continuation) > self.max_length + 1:
                truncated.add(tuple(context))
            if texts is None:
                continue
            self.sent[texts] = Sent(hash_ids(query.tokens[: query.first + 1]), query.targets)
            if len(self.continuations) < _MAX_CONTINUATIONS:
                self.continuations.setdefault(texts[1], tuple(continuation))
        self.n_truncated += len(truncated)
        answers = [(score.logprob, score.is_greedy) for score in self.scorer.score(queries)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _query(self, context: list[int], continuation: list[int]) -> Query:
        """The input whose last positions predict the continuation; too long a one loses tokens on the left."""
        if not 0 < len(continuation) <= self.max_length:
            raise InputError(
                f"a continuation of {len(continuation)} tokens cannot be scored: the model takes 1 to {self.max_length}"
            )
        return Query(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in windows of `max_length`, each token predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        texts = [str(r.args[0]) for r in requests]
        for owner, ids in enumerate(self.encoder.encode(texts)):
            for window in get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate until a stop string, the end token, or the longest length that the task allows."""
        read = read_requests(
            self.encoder,
            [(str(r.args[0]), dict(r.args[1])) for r in requests],
            stops=self.stops,
            max_length=self.max_length,
            max_new=self.max_gen_toks,
        )
        self.sent |= {(str(r.args[0]),): Sent(hash_ids(q.tokens)) for r, q in zip(requests, read, strict=True)}
        answers = self.scorer.generate(read, self.encoder, self.eos_ids)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, *, keeps_system: bool = False
    ) -> str:
        """The prompt text of a conversation.

        The tokenizer's own template, if it knows no system role, gets the conversation without, as by the `hf` backend,
        or with `keeps_system` before the first question; there a format has it that has no place for a system message.
        Special tokens of a format are marks in the text (`marked_text`), which only this encoder reads.

        Raises:
            InputError: an answer is begun and shall be continued, the tokenizer has not the format's tokens, or the
                template leaves the question out.
        """
        if self.prompt is not None and not isinstance(self.prompt, ChatTemplate):
            if not add_generation_prompt:
                raise InputError(
                    "this task begins the answer itself (gen_prefix), which only a chat template can write",
                    hint="evaluate it without --chat-template",
                )
            return marked_text(self.tokenizer, self.prompt.pieces(_system_in_question(chat_history, self.prompt)))
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            text = render(self.tokenizer, chat_history, **options)
        except TemplateRefusal:
            turns = [message for message in chat_history if message["role"] != "system"]
            if keeps_system:
                turns = [{"role": m.role, "content": m.content} for m in _with_system(chat_history)]
            text = render(self.tokenizer, turns, **options)
            self.n_without_system += len(turns) < len(chat_history) and not keeps_system
        if chat_history[-1]["content"].strip() not in text:
            raise InputError(
                f"the chat template leaves the question out: it writes {text[:60]!r}",
                hint="choose another format: --chat-template raw, alpaca, vicuna, …",
            )
        return text


def _system_in_question(history: Sequence[Mapping[str, str]], prompt: Prompt) -> list[Message]:
    """The messages; the system message in front of the first question where the format has no place for it.

    What lm-eval puts as a system message is the beginning of a text: the line ends after it are left out.
    """
    messages = [Message(str(m["role"]), str(m["content"])) for m in history]
    if messages[0].role == "system":
        messages[0] = Message("system", messages[0].content.rstrip())
    if messages[0].role != "system" or (isinstance(prompt, Turns) and prompt.system is not None):
        return messages
    return _with_system(history)


def _with_system(history: Sequence[Mapping[str, str]]) -> list[Message]:
    """The messages, the system message in front of the first question."""
    system, first, *rest = [Message(str(m["role"]), str(m["content"])) for m in history]
    return [Message(first.role, f"{system.content.rstrip()}\n\n{first.content}"), *rest]


def resolve_max_length(config: Mapping[str, Any], tokenizer: Any) -> int:
    """The longest input, by the `hf` backend's rule: the config, then the tokenizer, then 2,048."""
    inner = config.get("text_config")
    described = inner if isinstance(inner, Mapping) else config
    spelled = _spellings(described.get("model_type"))
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = described.get(key, described.get(spelled.get(key, key)))
        if value is not None:
            return int(value)
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < _UNSET_LENGTH else DEFAULT_MAX_LENGTH


def _spellings(model_type: Any) -> Mapping[str, str]:
    """What transformers' config class of a type calls keys that other classes have (`model_max_length`)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING_NAMES else {}
