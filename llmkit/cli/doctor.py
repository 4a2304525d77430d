"""`llmkit doctor`: is everything here that llmkit needs, and does it work?"""

from __future__ import annotations

from dataclasses import asdict

from llmkit.cli.command import command
from llmkit.cli.output import Output


@command("llmkit doctor", "llmkit doctor --json")
def doctor(out: Output) -> None:
    """Check the installation: versions, extras, torch, memory and disk, then a small model from end to end.

    Says what is wrong and how to mend it. Exit code 1 when something is.
    """
    from llmkit.cli.health import examine

    findings = examine()
    is_ok = all(f.state != "wrong" for f in findings)

    def render() -> None:
        width = max(len(f.name) for f in findings)
        for f in findings:
            out.line(f"{f.state:<5}  {f.name:<{width}}  {f.text}")
            if f.remedy:
                out.line(f"{'':<5}  {'':<{width}}  → {f.remedy}")

    document = {"ok": is_ok, "findings": [asdict(f) for f in findings]}
    out.answer(document, render, brief="ok" if is_ok else "not ok")
    if not is_ok:
        wrong = [f.name for f in findings if f.state == "wrong"]
        out.refuse(f"something is wrong: {', '.join(wrong)}")
