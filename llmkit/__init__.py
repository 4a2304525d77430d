"""llmkit: a workbench for open LLM checkpoints."""
