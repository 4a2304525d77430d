"""Benchmarks: lm-eval owns tasks and metrics, llmkit the model side."""
