"""The caches of the decoder, gathered: one batch of sequences, or many continuations of one prefix."""

from llmkit.decoder.kv import Cache, KVCache, Places
from llmkit.decoder.packed import Packed

__all__ = ["Cache", "KVCache", "Packed", "Places"]
