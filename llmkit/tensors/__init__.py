"""Tensor specs (eager) and lazy tensors (expressions over files)."""
