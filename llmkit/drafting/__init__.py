"""Drafts of plugins: what headers and config of an unknown model tell of its architecture."""
