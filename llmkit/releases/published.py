"""Hashes of published files, as data: files are identified by their SHA-256.

A hash that the source at hand gives only in part is stored as `first…last` and compared by these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# All were read for the project's fact sheet on formats.
SOURCES = {
    "C": "github.com/ymcui/Chinese-LLaMA-Alpaca, SHA256.md",
    "P": "the file names of github.com/pointnetwork/point-alpaca, which carry the SHA-256 of their contents",
    "B": "the file names of the encrypted releases of github.com/LianjiaTech/BELLE, which carry it likewise",
    "M": "the model card of Metharme-13B",
}


@dataclass(frozen=True)
class PublishedFile:
    """A published file.

    Attributes:
        sha256: 64 hexadecimal digits, or `first…last` digits.
        file: its name in the release.
        release: what it belongs to.
        source: a key of `SOURCES`.
    """

    sha256: str
    file: str
    release: str
    source: str

    @property
    def is_partial(self) -> bool:
        """True when only the first and last digits are known."""
        return "…" in self.sha256

    @property
    def where(self) -> str:
        """Where the hash was read."""
        return SOURCES[self.source]

    def matches(self, sha256: str) -> bool:
        """Whether a file of this hash is this one, as far as is known."""
        first, _, last = self.sha256.partition("…")
        return sha256 == first if not self.is_partial else sha256.startswith(first) and sha256.endswith(last)


def _shards(release: str, pattern: str, digests: Iterable[str]) -> list[PublishedFile]:
    names = list(digests)
    return [PublishedFile(d, pattern.format(i=i, k=i + 1, n=len(names)), release, "C") for i, d in enumerate(names)]


_META, _HF = "consolidated.{i:02d}.pth", "pytorch_model-{k:05d}-of-{n:05d}.bin"
KNOWN: tuple[PublishedFile, ...] = (
    *_shards("LLaMA-7B, Meta's own", _META, ["700df0d3013b703a806d2ae7f1bfb8e59814e3d06ae78be0c66368a50059f33d"]),
    *_shards("LLaMA-13B, Meta's own", _META, [
        "745bf4e29a4dd6f411e72976d92b452da1b49168a4f41c951cfcc8051823cf08",
        "d5ccbcc465c71c0de439a5aeffebe8344c68a519bce70bc7f9f92654ee567085",
    ]),
    *_shards("LLaMA-33B (30B), Meta's own", _META, [
        "e23294a58552d8cdec5b7e8abb87993b97ea6eced4178ff2697c02472539d067",
        "4e077b7136c7ae2302e954860cf64930458d3076fcde9443f4d0e939e95903ff",
        "24a87f01028cbd3a12de551dcedb712346c0b5cbdeff1454e0ddf2df9b675378",
        "1adfcef71420886119544949767f6a56cb6339b4d5fcde755d80fe68b49de93b",
    ]),
    *_shards("LLaMA-7B, converted to Hugging Face's layout", _HF, [
        "0087155d6df07106c1d910bfeb6aab1be8e612dfbf2b56ddfb4ccbde7dbd50d0",
        "461bc5e50200db7813ff99cc0b9316c48ccbd6aaaa31bf8cf7bee0b64bc3eda3",
    ]),
    *_shards("LLaMA-13B, converted to Hugging Face's layout", _HF, [
        "dd20cdee2637408c6ab88c13f5c27d153bacd0e99f2d55f6a66fbd0269944436",
        "1aba886c5f28d2e2e9b04ab3c4f5bc250c6b06efc1baa3f557677b3097f70e6a",
        "2efc56cddb7877c830bc5b402ee72996aedb5694c9e8007bf1d52d72c0d97d26",
    ]),
    *_shards("Chinese-LLaMA-7B, merged, saved with torch >= 1.13", _META,
             ["245427a306e3253db3f534e2a1d7548a8eb781ae8761f9e98979b4aced6b43d8"]),
    *_shards("Chinese-Alpaca-7B, merged, saved with torch >= 1.13", _META,
             ["fbfccc91183169842aac8d093379f0a449b5a26c5ee7a298baf0d556f1499b90"]),
    *_shards("Chinese-LLaMA-Plus-7B, merged, saved with torch >= 1.13", _META,
             ["f8d380d63f77a08b7f447f5ec63f0bb1cde9ddeae2207e9f86e6b5f0f95a7955"]),
    *_shards("Chinese-Alpaca-Plus-7B, merged, saved with torch >= 1.13", _META,
             ["8b8f6551d0d83f93e378622b9f8dad0bec189da6c29d8a78de493e6aee9bd35f"]),
    PublishedFile("2a2c24d0…79d86", "adapter_model.bin", "Chinese-LLaMA-LoRA-7B", "C"),
    PublishedFile("8c928db8…46be", "adapter_model.bin", "Chinese-LLaMA-Plus-LoRA-7B", "C"),
    PublishedFile("6a4ce789…f9fc", "adapter_model.bin", "Chinese-LLaMA-LoRA-13B", "C"),
    PublishedFile("0d9b6ed8…6e36de", "adapter_model.bin", "Chinese-Alpaca-LoRA-7B", "C"),
    PublishedFile("4ee0bf80…b795d", "adapter_model.bin", "Chinese-Alpaca-Plus-LoRA-7B", "C"),
    PublishedFile("a1fcdcb6…f4706", "adapter_model.bin", "Chinese-Alpaca-Plus-LoRA-13B", "C"),
    PublishedFile("9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347", "tokenizer.model",
          "LLaMA, the original tokenizer", "P"),
    PublishedFile("e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0", "tokenizer.model",
          "Chinese-LLaMA", "C"),
    PublishedFile("2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8", "tokenizer.model",
          "Chinese-Alpaca", "C"),
    PublishedFile("fd7ff399e5568cc21a0a8414f43df88ef7c424995b9b97a90563165d2cf79efd", "generation_config.json",
          "BELLE", "B"),
    PublishedFile("a23652fc622a27b8863c39f524707796967095b2a85f334561b11422f71445a2", "generation_config.json",
          "Metharme-13B", "M"),
)  # fmt: skip

# The key of the encrypted releases (also of those made from LLaMA-13B).
KEY_FILE = KNOWN[0]


def identify(sha256: str, table: Iterable[PublishedFile] = KNOWN) -> PublishedFile | None:
    """The published file of this hash: one that is known in full first, else one that fits as far as is known."""
    return next((k for k in sorted(table, key=lambda k: k.is_partial) if k.matches(sha256)), None)
