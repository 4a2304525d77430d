"""The torch reader of the architecture kinds."""

from llmkit.decoder.load import load_backend, load_decoder

__all__ = ["load_backend", "load_decoder"]
