"""Statistics of the inputs of one linear layer, for methods that use more than its weight."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.errors import InputError
from llmkit.lazy_imports import torch
from llmkit.tensors.finite import count_not_finite
from llmkit.tensors.products import add_product

MEASURE = "measure them again: llmkit quantize observe MODEL -o FILE"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Inputs x [tokens, in] of a layer, summed up; what was not measured is None.

    Attributes:
        n_tokens: how many rows of x were seen, or what else the sums are to be divided by for the mean.
        second_moments: the sum of x x^T, float32 or float64 [in, in].
        cross_moments: the sum of (f - x) x^T, f being what the model in floats has in the place of x; as these.
        squares: the diagonal of the second moments, the sum of x^2, float32 or float64 [in].
        maxima: the largest |x|, float32 [in].
        inputs: x itself, [tokens, in].
        cross_products: the sum of W (f - x) x^T, W being the weight of the layer, float32 [out, in]; measured in place
            of the cross moments where they are fewer numbers.
        output_moments: the sum of J^T J, J being the derivative of the output of the decoder block by the outputs of
            the layer, float32 [out, out]; None also where the output of the block is that of the layer and others.
    """

    n_tokens: float
    second_moments: torch.Tensor | None = None
    cross_moments: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    maxima: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    cross_products: torch.Tensor | None = None
    output_moments: torch.Tensor | None = None

    def require_finite(self) -> None:
        """Refuse sums of inputs that were no numbers, and sums of squares that no inputs have.

        Raises:
            InputError: some are NaN or infinite, or below 0.
        """
        squares = self.squares if self.second_moments is None else self.second_moments.diagonal()
        for values in (squares, self.squares, self.maxima):
            if values is not None and bool((values < 0).any()):
                raise InputError("what was measured of its inputs holds squares or maxima below 0", hint=MEASURE)
        sums = (self.second_moments, self.cross_moments, self.cross_products, self.squares, self.maxima, self.inputs)
        for values in sums:
            if values is not None and count_not_finite(values):
                raise InputError(
                    "the inputs that the layer gets from the calibration text hold NaN or infinities",
                    hint="look at what the model computes: llmkit perplexity MODEL --text FILE; or calibrate on "
                    "another text",
                )

    def crossed(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The cross products of a weight, float32 [out, in]; None where inputs of the floats were not seen."""
        if self.cross_products is not None or self.cross_moments is None:
            return self.cross_products
        return add_product(torch.empty_like(weight), weight, self.cross_moments.float(), beta=0)

    @property
    def mean_squares(self) -> torch.Tensor | None:
        """The mean of x^2 of each input channel, float32 [in]; None where nothing tells it, or all of them are 0."""
        squares = self.squares
        if squares is None and self.second_moments is not None:
            squares = self.second_moments.diagonal()
        if squares is None or not bool((squares > 0).any()):
            return None
        return squares.float() / max(self.n_tokens, 1)
