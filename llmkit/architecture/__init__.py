"""Architectures as data: kinds, name tables, the registry of plugins."""
