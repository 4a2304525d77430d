"""How much is lost where one matrix is stored in fewer bits, all others in floats: what bits are allocated by.

    with a text         of a block's output: mean over tokens of |y' - y|^2 / |y|^2; of the head, of its logits less
                        their mean; of the embedding, of the rows that are looked up
    with statistics     of the outputs of the matrix: tr(D M D') / tr(W M W'), D = W' - W, M the second moments of its
                        inputs, or their diagonal
    with nothing        of the weights: |D|^2 / |W|^2

All are shares, so that they can be compared and added up across matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from llmkit.calibration.blocks import Blocks
from llmkit.calibration.learning import KeptWeights
from llmkit.calibration.observe import ObserverHook
from llmkit.calibration.samples import Samples
from llmkit.calibration.stage import BlockStage
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.statistics import StoredStatistics
from llmkit.lazy_imports import torch
from llmkit.pipeline.pool import map_on_cores
from llmkit.pipeline.stage import BlockResult
from llmkit.quantization.codec import error_context
from llmkit.tensors.constant import constant
from llmkit.tensors.device import CPU
from llmkit.tensors.lazy import Context, Lazy
from llmkit.tensors.stopped import raise_if_stopped
from llmkit.transforms.candidates import Restore

_HEAD, _EMBEDDING = "head.weight", "embed.weight"
_N_TOKENS, _N_HEAD_TOKENS = 4096, 256  # of the text: errors are means, and their order is what counts


@dataclass(frozen=True, eq=False)
class Trial:
    """A matrix, and ways to store it.

    Attributes:
        weights: what is in it, by canonical id, [out, in] each.
        layer: None outside the layers.
        restores: how it is read after it was stored in each of the ways that lose something.
    """

    weights: Mapping[str, Lazy]
    layer: int | None
    restores: Sequence[Restore]


def errors_of_weights(matrices: Mapping[str, Trial], known: StoredStatistics | None) -> dict[str, list[float]]:
    """The error of each way to store each matrix, by its weights and what is known of their inputs."""
    jobs = [(matrix, restore) for matrix in matrices.values() for restore in matrix.restores]
    errors = iter(map_on_cores(lambda job: _of_weights(job[0], job[1], known), jobs))
    return {name: [next(errors) for _ in matrix.restores] for name, matrix in matrices.items()}


def _of_weights(matrix: Trial, restore: Restore, known: StoredStatistics | None) -> float:
    error = norm = 0.0
    for weight, lazy in matrix.weights.items():
        fields = known.parts.get(weight, {}) if known is not None else {}
        moments, squares = fields.get("second_moments"), fields.get("squares")
        if squares is None and moments is not None:
            squares = constant(moments.load().diagonal().float())
        value = lazy.load().float()
        with error_context(weight):
            change = restore(lazy, squares).load().float() - value
        metric = moments.load().float() if moments is not None else squares.load() if squares is not None else None
        error, norm = error + _weighted(change, metric), norm + _weighted(value, metric)
    return _rounded(error / norm if norm else 0.0)


def _weighted(x: torch.Tensor, metric: torch.Tensor | None) -> float:
    """tr(x M x') of x [out, in], M being [in, in], its diagonal [in], or one."""
    if metric is None:
        return float(x.square().sum())
    return float(((x @ metric) * x).sum()) if metric.dim() == 2 else float((x.square() * metric).sum())


def _rounded(error: float) -> float:
    """To three digits: sums in another order, on another machine, choose the same."""
    return float(f"{error:.3g}")


def errors_on_text(
    ckpt: Checkpoint,
    samples: Samples,
    matrices: Mapping[str, Trial],
    report: Callable[[str], None],
    *,
    device: str = CPU,
) -> dict[str, list[float]]:
    """The error of each way to store each matrix, while the model reads some windows of a text.

    Args:
        report: told which block is at work.
        device: where blocks compute.

    Raises:
        InputError: a text shorter than a window.
        RequirementError: no plugin describes the model.
    """
    few = replace(samples, n=max(min(samples.n, _N_TOKENS // samples.length), 1))
    n_blocks = len(ckpt.require_model().blocks)
    compute = partial(_of_block, matrices, n_blocks)
    windows = partial(few.rows, ckpt, ckpt.prompt_suffix())
    stage = BlockStage(ckpt, windows, lambda: (n_blocks, few.attrs()), compute, device)
    context = Context()
    errors: dict[str, list[float]] = {}
    for index in range(n_blocks):
        report(f"measuring block {index + 1}/{n_blocks}")
        errors |= stage.block(index, context).result["errors"]
    return {name: [_rounded(error) for error in errors[name]] for name in matrices}


def _of_block(
    matrices: Mapping[str, Trial],
    n_blocks: int,
    blocks: Blocks,
    index: int,
    state: Mapping[str, Lazy],
    context: Context,
) -> BlockResult:
    hidden = state["hidden"].load()
    hook = ObserverHook(["squares"])
    after = blocks.run(index, hidden.clone(), hook)
    squares = {name.removesuffix(".squares"): constant(x) for name, x in hook.statistics.items()}
    weights, rows = KeptWeights(blocks.weights), list(range(len(hidden)))
    own = {name: matrix for name, matrix in matrices.items() if matrix.layer == index}

    def measured(job: tuple[Trial, Restore]) -> float:
        raise_if_stopped()
        matrix, restore = job
        with torch.inference_mode():
            replacements = {}
            for weight, lazy in matrix.weights.items():
                with error_context(weight):
                    restored = restore(lazy, squares.get(weight)).load().float()
                replacements[weight] = restored.to(blocks.device)
            changed = blocks.outputs(index, hidden, weights.replaced(replacements), rows).to(CPU)
            return _share(changed - after, after)

    jobs = [(matrix, restore) for matrix in own.values() for restore in matrix.restores]
    shares = iter(map_on_cores(measured, jobs))
    errors = {name: [next(shares) for _ in matrix.restores] for name, matrix in own.items()}
    with torch.inference_mode():
        if index == n_blocks - 1:
            ids = state["ids"].load()
            outside, normed = {n: m for n, m in matrices.items() if m.layer is None}, blocks.normed(after)
            errors |= {name: _of_head_and_embedding(matrix, ids, normed) for name, matrix in outside.items()}
    return BlockResult({"errors": errors}, [("hidden", after)])


def _of_head_and_embedding(matrix: Trial, ids: torch.Tensor, hidden: torch.Tensor) -> list[float]:
    """Of a head, an embedding, or one matrix that is both."""
    states = hidden.flatten(0, -2)[:: max(hidden[..., 0].numel() // _N_HEAD_TOKENS, 1)].float()
    errors = []
    for restore in matrix.restores:
        error = 0.0
        for weight, lazy in matrix.weights.items():
            value = lazy.load().float()
            change = restore(lazy, constant(states.square().sum(0))).load().float().sub_(value)
            if weight == _EMBEDDING:
                error += _share(change[ids.flatten()], value[ids.flatten()])
            elif weight == _HEAD:
                of_change, of_value = states @ change.T, states @ value.T
                error += _share(of_change - of_change.mean(-1, True), of_value - of_value.mean(-1, True))
            else:
                error += _weighted(change, None) / max(_weighted(value, None), 1e-20)
        errors.append(error)
    return errors


def _share(change: torch.Tensor, value: torch.Tensor) -> float:
    """The mean over rows of |change|^2 / |value|^2; both [..., n]."""
    norms = value.float().square().sum(-1)
    return float((change.float().square().sum(-1) / norms.clamp(min=1e-20)).mean())
