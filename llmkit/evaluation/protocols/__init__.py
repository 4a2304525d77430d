"""Published ways to score a benchmark, one module each; `llmkit.evaluation.protocol` says what one is."""
