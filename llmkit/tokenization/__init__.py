"""Tokenizer files: read, edited and written again without a tokenizer framework."""
