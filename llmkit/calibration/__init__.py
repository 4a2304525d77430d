"""What is measured while a decoder reads a text: for quantization methods, and for the scales of an int8 cache."""
