"""Releases that are no checkpoints yet: files coded with the bytes of another model, and the hashes they publish."""
