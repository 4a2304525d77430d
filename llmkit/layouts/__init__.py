"""File layouts of decoders other than transformers' own: read as transformers' view, and written from it."""
