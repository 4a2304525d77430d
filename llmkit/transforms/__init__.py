"""Pure functions Checkpoint -> Checkpoint."""
