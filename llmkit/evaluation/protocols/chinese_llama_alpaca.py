"""C-Eval by ymcui/Chinese-LLaMA-Alpaca, scripts/ceval/llama_evaluator.py.

The header names the subject by its file (`law`), not by its Chinese name; without shots there is none. In the forms
with a prompt the whole stands in Alpaca's instruction, and the question ends with `答案是什么？ `.

Constrained decoding is one step of `generate`: of each letter two tokens count, `A` alone and the `A` that follows
`：`, and the sum of their two *logits* decides, after the repetition penalty of 1.1 that the script's generation has.
(Its temperature of 0.2 changes no order.) Free decoding writes up to 20 tokens under that penalty and reads the letter
out of them. The script samples there (temperature 0.2, top-k 40, top-p 0.9) and draws a letter where it finds none;
here the most likely token is taken, and a question without a letter has no choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmkit.decoder.sampling import Sampling
from llmkit.errors import InputError
from llmkit.evaluation import extraction
from llmkit.evaluation.documents import FOUR
from llmkit.evaluation.prompting import Case, Ids, Prompt, Prompting, Session
from llmkit.evaluation.protocol import Average
from llmkit.evaluation.protocols.ceval_cot import write_item
from llmkit.evaluation.record import Question

if TYPE_CHECKING:
    from llmkit.evaluation.targets import Score

_PENALTY = 1.1
_MAX_NEW = 20
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response: "
)


@dataclass(frozen=True)
class ChineseAlpaca(Prompting):
    """The figures that the authors of Chinese-LLaMA-Alpaca report.

    Attributes:
        has_prompt: the question stands in Alpaca's instruction.
        is_constrained: logits of letters decide, not a written text.
    """

    name: str
    has_prompt: bool = False
    is_constrained: bool = True
    average: Average = "micro"

    def answer(self, session: Session, cases: Sequence[Case], *, chat: bool) -> list[Question]:
        """The letter with the greatest sum of logits, or the one in the text that is written."""
        max_new = 1 if self.is_constrained else _MAX_NEW
        prompts = session.prompts([self._write(case) for case in cases], max_new=max_new)
        if self.is_constrained:
            alone = [ids[0] for ids in session.encode(FOUR, special=False)]
            after = [ids[-1] for ids in session.encode([f"：{letter}" for letter in FOUR], special=False)]
            options = [[(a,), (b,)] for a, b in zip(alone, after, strict=True)]
            return session.choose(cases, prompts, [options] * len(cases), value=_sum_of_logits)
        texts = session.generate(prompts, max_new=max_new, sampling=Sampling(repetition_penalty=_PENALTY))
        letters = [extraction.of_alpaca(text, case.item.choices) for case, text in zip(cases, texts, strict=True)]
        return session.take(cases, prompts, texts, letters)

    def _write(self, case: Case) -> str:
        shots = "".join(f"{write_item(shot)}{shot.answer}\n\n" for shot in case.shots)
        header = f"以下是中国关于{case.subject.name}考试的单项选择题，请选出其中的正确答案。\n\n" if case.shots else ""
        if self.has_prompt:
            return _ALPACA.format(f"{header}{shots}{case.item.text}\n答案是什么？ ")
        return f"{header}{shots}{write_item(case.item)}"


def _sum_of_logits(prompt: Prompt, sequences: Sequence[Ids], scores: Sequence[Score]) -> float:
    total = 0.0
    for (token,), score in zip(sequences, scores, strict=True):
        if score.logit is None:
            raise InputError(
                "--protocol chinese-llama-alpaca reads logits, which this backend does not tell",
                hint="--backend llmkit, transformers or onnx",
            )
        penalty = _PENALTY if token in prompt.ids else 1.0
        total += score.logit * penalty if score.logit < 0 else score.logit / penalty
    return total


PROTOCOL = ChineseAlpaca("chinese-llama-alpaca")
PROMPT = ChineseAlpaca("chinese-llama-alpaca-prompt", has_prompt=True)
FREE = ChineseAlpaca("chinese-llama-alpaca-free", is_constrained=False)
PROMPT_FREE = ChineseAlpaca("chinese-llama-alpaca-prompt-free", has_prompt=True, is_constrained=False)
