"""Importance matrices as others write them: the gguf library, and the order that llama.cpp's source has."""

from __future__ import annotations

import struct

import gguf
import numpy as np

SUMS = {"blk.0.attn_q.weight": np.arange(1, 9, dtype="<f4"), "blk.0.ffn_down.weight": np.full(12, 6.0, "<f4")}
TOKENS = 48


def of_gguf(path, all_sums=SUMS, *, kind="imatrix", counts=TOKENS):
    """As `llama-imatrix` writes it: sorted names, each with `in_sum2` and `counts` (and the newer `in_sum`)."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, ["wiki.txt"])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, 3)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, 16)
    for name, sums in all_sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.atleast_2d(sums))
        writer.add_tensor(f"{name}.counts", np.atleast_2d(np.array(counts, "<f4")))
        writer.add_tensor(f"{name}.in_sum", np.atleast_2d(sums) / 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_binary(path, all_sums=SUMS, *, has_dataset=True):
    """As `save_imatrix_legacy` writes it: means times calls, then chunks and the text."""
    data = struct.pack("<i", len(all_sums))
    for name, sums in sorted(all_sums.items()):
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 3, len(sums))
        data += (sums / TOKENS * 3).tobytes()
    data += struct.pack("<ii", 3, 8) + b"wiki.txt" if has_dataset else b""
    path.write_bytes(data)
    return path
