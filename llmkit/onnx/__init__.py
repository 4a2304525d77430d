"""The graph reader of the architecture kinds: ONNX on ONNX Runtime's fused ops, weights left where they are."""
