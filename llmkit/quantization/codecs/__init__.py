"""Layouts of quantized matrices, one module each; `llmkit.quantization.codec` says what one is."""
