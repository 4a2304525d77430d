"""Looking at checkpoints: what one is, how two differ, whether one is still what was written."""
