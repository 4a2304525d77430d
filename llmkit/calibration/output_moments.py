"""How the output of a decoder block moves with the outputs of its linear layers: the sum of J^T J over tokens.

With random signs r, one for each number that the block puts out, g = J^T r is the gradient of their product; and J^T J
is the mean of g g^T over r, as r r^T is 1 in the mean (Hutchinson 1990). Each token of some samples gives one such g.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from llmkit.calibration.blocks import Blocks, Watched, Watching
from llmkit.calibration.learning import KeptWeights
from llmkit.lazy_imports import torch


def output_moments(
    blocks: Blocks,
    index: int,
    hidden: torch.Tensor,
    samples: Sequence[int],
    asked: Collection[str],
    n_rows: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    """By weight, float32 [out, out]; without those whose outputs are added to the block's as they are: J is 1.

    Args:
        hidden: the inputs of the block, [B, S, hidden].
        samples: which of them to look at.
        asked: weights (`layers.3.attn.q.weight`).
        n_rows: of every weight of the block.
    """
    with torch.inference_mode(False), torch.enable_grad():
        gradients = _Gradients(asked, n_rows)
        weights = Watched(KeptWeights(blocks.weights), gradients)
        for sample in samples:
            ids = blocks.ids[sample : sample + 1].clone()
            inputs = hidden[sample : sample + 1].clone().requires_grad_()
            output = blocks.of(ids).outputs(index, inputs, weights, [0])
            gradients.signs = _signs(ids, output)
            output.backward(gradients.signs)
        return gradients.sums


def _signs(ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Drawn by the tokens of the sample: the same ones in whichever process it is computed."""
    digest = hashlib.sha256(ids.numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    drawn = torch.randint(2, output.shape, generator=generator, device="cpu")
    return drawn.to(output).mul_(2).sub_(1)


class _Gradients(Watching):
    """What looks at the linear layers of a block, and sums up the gradients of their outputs.

    Attributes:
        signs: by which the outputs of the block are multiplied.
        sums: of g g^T over tokens, by weight.
    """

    def __init__(self, asked: Collection[str], n_rows: Mapping[str, int]) -> None:
        self._asked, self._n_rows = frozenset(asked), n_rows
        self.signs: torch.Tensor | None = None
        self.sums: dict[str, torch.Tensor] = {}

    def computed(self, weights: tuple[str, ...], outputs: torch.Tensor) -> None:
        if outputs.requires_grad and self._asked.intersection(weights):
            outputs.register_hook(partial(self._add, weights))

    def _add(self, weights: tuple[str, ...], gradients: torch.Tensor) -> None:
        of_each = gradients.flatten(0, -2).float().split([self._n_rows[weight] for weight in weights], -1)
        for weight, g in zip(weights, of_each, strict=True):
            if weight in self._asked and not self._are_signs(g):
                known = self.sums.get(weight)
                self.sums[weight] = g.T @ g if known is None else known.addmm_(g.T, g)

    def _are_signs(self, g: torch.Tensor) -> bool:
        """Whether g [tokens, out] are the signs, or the same multiple of all of them."""
        if self.signs is None or g.numel() != self.signs.numel():
            return False
        factors = g * self.signs.view_as(g)
        return bool(((factors - factors[0, 0]).abs() <= 1e-5 * factors[0, 0].abs()).all())
