"""Vocabularies: extend one, trim one, look at one. Pure; no tensor data is read."""
