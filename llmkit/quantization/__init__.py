"""Pure tensor mathematics of quantization: schemes, rounding, packing."""
