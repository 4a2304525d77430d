"""Drafts of plugins: a foreign checkpoint, matched with the name tables and kinds of those that are installed."""
