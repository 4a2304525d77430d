"""The activations that configs name, as transformers' ACT2FN has them; every reader of the kinds knows each of them."""

from __future__ import annotations

from llmkit.errors import RequirementError, nearest

ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu",
    "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "tanh",
)  # fmt: skip
# Other names of the same function: the exact GELU, and its approximation by tanh written in other ways.
_ALIASES = {
    "swish": "silu", "gelu_python": "gelu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh", "gelu_python_tanh": "gelu_pytorch_tanh",
}  # fmt: skip
_WITH_WEIGHTS = ("prelu", "xielu")
QUICK_GELU_SLOPE = 1.702
LAPLACE_MEAN, LAPLACE_DEVIATION = 0.707107, 0.282095  # Ma et al. 2022 (MEGA), arXiv:2209.10655


def same_activation(name: str) -> str:
    """The one of several names of a function under which it is compared; a name that is not known stays."""
    return _ALIASES.get(name, name)


def known_activation(name: str) -> str:
    """The name in `ACTIVATIONS` of what a config calls `name`.

    Raises:
        RequirementError: no such activation, or one with weights of its own.
    """
    alias = same_activation(name)
    if alias in ACTIVATIONS:
        return alias
    if alias in _WITH_WEIGHTS:
        raise RequirementError(
            f"config.json: the activation {name!r} has weights of its own, which no kind of MLP holds",
            hint="--backend transformers computes it with transformers' class",
        )
    names = (*ACTIVATIONS, *_ALIASES)
    guess = nearest(name, names)
    raise RequirementError(
        f"config.json: no activation is called {name!r}",
        hint=f"did you mean {guess!r}?" if guess else f"known: {', '.join(sorted(names))}",
    )
