"""Benchmarks: task files, subjects, categories; and the mini model."""
