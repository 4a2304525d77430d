"""Weight deltas: applied as the published script applies them, made so that every bit comes back."""

from llmkit.transforms.delta.transform import apply, make

__all__ = ["apply", "make"]
