"""The version, where the manifest, the plan digest and `llmkit --version` find it without importing more."""

__version__ = "0.2.0"
