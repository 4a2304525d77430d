"""Ways to quantize a matrix, one module each; `llmkit.quantization.method` says what one is."""
