"""`llmkit generate`: text from a model, as it is made."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.command import command
from llmkit.cli.options import DeviceOption, DtypeOption, ModelArgument, SeedOption
from llmkit.cli.output import Output

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        "generate",
        examples=[
            "llmkit generate vicuna-7b 'The capital of France is' --max-tokens 20",
            "llmkit generate vicuna-7b 'Tell me a joke.' --chat --temperature 0.8 --top-p 0.95 --seed 7",
            "echo 'Once upon a time' | llmkit generate vicuna-7b -",
        ],
    )(generate)


def generate(
    out: Output,
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads it from stdin.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt in the model's chat format (its template, or its family's).")
    ] = False,
    prompt_format: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="NAME", help="Another format: alpaca, vicuna, llama-2-chat, chat-template, raw."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Stop after N tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 takes the most likely token; 1 samples as trained.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="Of the K most likely tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="Of the most likely tokens that make up P only.")
    ] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Generate text from a prompt, greedily or sampled, and print it as it is made."""
    import sys

    from llmkit.checkpoint.checkpoint import open_checkpoint
    from llmkit.checkpoint.tokenizer import end_tokens, load_tokenizer
    from llmkit.decoder import load_decoder
    from llmkit.decoder.generate import Sampling, stream
    from llmkit.tokenization.agreement import compare_vocabulary

    sampling = Sampling(temperature, top_k, top_p, seed)
    ckpt = open_checkpoint(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    tokenizer = load_tokenizer(ckpt)
    if odd := compare_vocabulary(ckpt).warning:
        out.warning(odd)
    ids = _encode(ckpt, tokenizer, text, chat=chat, name=prompt_format)
    decoder = load_decoder(ckpt, dtype=dtype, device=device)
    started = time.monotonic()
    new: list[int] = []
    shown = ""
    for token in stream(decoder, ids, sampling, max_tokens=max_tokens, end_ids=end_tokens(ckpt)):
        new.append(token)
        if out.is_human:
            # A character may be spelt by several tokens: print only what later tokens cannot change.
            whole = tokenizer.decode(new, skip_special_tokens=True)
            if not whole.endswith("\ufffd"):
                out.text(whole[len(shown) :])
                shown = whole
    elapsed = time.monotonic() - started
    whole = tokenizer.decode(new, skip_special_tokens=True)
    document = {
        "text": whole,
        "n_prompt_tokens": len(ids),
        "n_tokens": len(new),
        "tokens": new,
        "stopped": "length" if len(new) == max_tokens else "end token",
        "elapsed_s": round(elapsed, 3),
    }
    out.answer(document, lambda: out.line(whole[len(shown) :]), brief=whole)
    out.note(f"{len(new)} tokens in {elapsed:.1f} s ({len(new) / max(elapsed, 1e-9):.1f}/s)")


def _encode(ckpt: Checkpoint, tokenizer: Any, text: str, *, chat: bool, name: str | None) -> list[int]:
    """Token ids of the prompt, with what the tokenizer or the chat format puts around it."""
    from llmkit.architecture import registry
    from llmkit.architecture.prompts import ChatTemplate, Instruction, Message, Raw, Turns, choose_prompt

    has_template = bool(getattr(tokenizer, "chat_template", None))
    found: Any = Raw()
    if chat or name is not None:
        architecture = registry.find(ckpt.config)
        found = choose_prompt(
            name, has_chat_template=has_template, family=architecture.prompt if architecture else None
        )
    if isinstance(found, ChatTemplate):
        turns = [{"role": "user", "content": text}]
        written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself.
        return list(tokenizer(written, add_special_tokens=False)["input_ids"])
    if isinstance(found, Turns):
        text = found.render([Message("user", text)])
    elif isinstance(found, Instruction):
        text = found.render(text)
    return list(tokenizer(text)["input_ids"])
