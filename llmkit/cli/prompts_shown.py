"""`llmkit eval --show N`: the prompts that a run would send, as text and as token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.cli.output import Output

if TYPE_CHECKING:
    from llmkit.evaluation.planning import Selection


def show_prompts(out: Output, model: str, selection: Selection) -> None:
    """Print them."""
    from llmkit.evaluation.runner import preview

    prompts = preview(model, selection)

    def render() -> None:
        for p in prompts:
            out.line(f"── {p.bench} {p.subject} {p.id}: {len(p.ids)} tokens, sha256 {p.prompt} ──")
            out.line(p.text)
            out.line()
            out.record(
                {
                    "ids": " ".join(map(str, p.ids)),
                    "answer at": len(p.ids),
                    "choices": "\n".join(" ".join(map(str, ids)) for ids in p.choices) or "(text is generated)",
                }
            )
            out.line()

    brief = "\n".join(f"{p.bench} {p.subject} {p.id} {p.prompt}" for p in prompts)
    out.answer({"prompts": [p.to_json() for p in prompts]}, render, brief=brief)
