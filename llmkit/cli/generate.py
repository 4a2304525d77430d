"""`llmkit generate`: text from a model, as it is made."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli.command import command
from llmkit.cli.options import ChatOptions, ComputeOptions, ModelArgument, SeedOption
from llmkit.cli.output import Output
from llmkit.errors import counted


@command(
    "llmkit generate vicuna-7b 'The capital of France is' --max-tokens 20",
    "llmkit generate vicuna-7b 'Tell me a joke.' --chat --temperature 0.8 --top-p 0.95 --seed 7",
    "llmkit generate chatglm3-6b --messages talk.json --system 'Answer in one sentence.'",
    "llmkit generate vicuna-7b 'Tell me a joke.' --chat --show-prompt",
    "echo 'Once upon a time' | llmkit generate vicuna-7b -",
)
def generate(
    out: Output,
    model: ModelArgument,
    templates: ChatOptions,
    computing: ComputeOptions,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads it from stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message; implies --chat.")] = None,
    messages: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The conversation so far, JSON or JSON lines of role and content."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show-prompt", help="Print the exact tokens of the prompt, and generate nothing.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Stop after N tokens.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T", help="0: the most likely token. Above: sample; 1 leaves the probabilities as they are."
        ),
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Sample from the K most likely tokens only (default: all).")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Sample from the most likely tokens whose probabilities add up to P (default: all)."
        ),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Generate text from a prompt, greedily or sampled, and print it as it is made."""
    from llmkit.architecture.prompts import Raw
    from llmkit.checkpoint.tokenizer import end_tokens, load_tokenizer
    from llmkit.cli.conversation import read_conversation, show_prompt
    from llmkit.decoder.generate import stream
    from llmkit.decoder.sampling import Sampling
    from llmkit.decoder.stopping import TextStream
    from llmkit.tokenization.chat import encode_chat, ending_of, prompt_of

    sampling = Sampling(temperature, top_k, top_p, seed)
    if temperature == 0:
        out.refuse_options(
            {"top_k", "top_p"}, "greedy text (--temperature 0)", "add --temperature 0.8, or another above 0"
        )
    out.status_line.hold()  # what is typed stands in the terminal
    talk = read_conversation(prompt, system, messages)
    out.status_line.release()
    ckpt = computing.open(out, model, "generate")
    tokenizer = load_tokenizer(ckpt)
    is_chat = templates.chat or templates.name is not None or len(talk) > 1
    form = prompt_of(ckpt, tokenizer, templates.name) if is_chat else Raw()
    if is_chat and templates.name is None and isinstance(form, Raw):
        out.warning(
            f"{ckpt.label} has no chat template, and no plugin a format for it: choose one with --chat-template NAME"
        )
    # text without a format is encoded as transformers would, special tokens in it included
    ids = list(tokenizer(talk[-1].content)["input_ids"]) if not is_chat else encode_chat(tokenizer, form, talk)
    if show:
        show_prompt(out, tokenizer, ids)
        return
    ending = ending_of(tokenizer, form)
    decoder = computing.load(out, ckpt)
    out.doing("reading the prompt")
    started = time.monotonic()
    new = TextStream(lambda some: str(tokenizer.decode(some, skip_special_tokens=True)), ending.texts, ending.finish)
    end_ids = {*end_tokens(ckpt), *ending.ids}
    first: float | None = None
    for token in stream(decoder, ids, sampling, max_tokens=max_tokens, end_ids=end_ids):
        first = first if first is not None else time.monotonic() - started
        piece = new.push(token)
        if out.is_human:
            out.text(piece)
        if new.is_stopped:
            break
    elapsed = time.monotonic() - started
    document = {
        "text": new.text,
        "n_prompt_tokens": len(ids),
        "n_tokens": len(new.ids),
        "tokens": new.ids,
        "stopped": "stop text" if new.is_stopped else "length" if len(new.ids) == max_tokens else "end token",
        "elapsed_s": round(elapsed, 3),
        "first_token_s": round(first, 3) if first is not None else None,
    }
    out.answer(document, lambda: out.line(new.rest()), brief=new.text)
    out.note(_speed(len(new.ids), elapsed, first))


def _speed(n_tokens: int, elapsed: float, first: float | None) -> str:
    """Tokens and time; the prompt, and what is opened at the first call, are no part of the rate."""
    text = f"{counted(n_tokens, 'token')} in {elapsed:.1f} s"
    if first is None or n_tokens < 2:
        return text
    return f"{text}, the first after {first:.1f} s, then {(n_tokens - 1) / max(elapsed - first, 1e-9):.1f}/s"
