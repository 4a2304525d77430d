"""Adapters of lit-llama and LitGPT, one matrix for several projections."""

from __future__ import annotations

import pytest
import torch

from llmkit.errors import InputError
from llmkit.formats.adapter_opening import read_adapter


def lit_expected(a, b, enabled, scale):
    """lit_llama/lora.py: a grouped convolution, zero-padded into the disabled thirds."""
    delta = torch.nn.functional.conv1d(a[None], b[..., None], groups=sum(enabled))[0] * scale
    size = b.shape[0] // sum(enabled)
    out = torch.zeros(3 * size, a.shape[1])
    index = torch.tensor(enabled).repeat_interleave(size)
    out[index] = delta
    return out


def test_lit_llama(tmp_path):
    a, b = torch.randn(4, 8), torch.randn(16, 2)
    torch.save(
        {"model": {"transformer.h.0.attn.c_attn.lora_A": a, "transformer.h.0.attn.c_attn.lora_B": b}},
        tmp_path / "l.pth",
    )
    with pytest.raises(InputError, match="without its alpha") as caught:
        read_adapter(tmp_path / "l.pth")
    assert "--alpha" in caught.value.hint
    adapter = read_adapter(tmp_path / "l.pth", alpha=16)
    parts = adapter.modules["transformer.h.0.attn.c_attn"]
    update = adapter.scaling["transformer.h.0.attn.c_attn"] * parts["lora_B"].load() @ parts["lora_A"].load()
    assert torch.allclose(update, lit_expected(a, b, [True, False, True], 8.0), atol=1e-5)


@pytest.mark.parametrize(
    ("last", "enabled"), [("qkv", (1, 0, 1)), ("qkv", (1, 1, 1)), ("attn", (1, 0, 1)), ("attn", (0, 1, 1))]
)
def test_litgpt_with_grouped_queries(tmp_path, last, enabled):
    heads, groups, size, rank = 4, 2, 3, 2
    sizes = [heads * size, groups * size, groups * size]
    on = [n for n, e in zip(sizes, enabled, strict=True) if e]
    a, b = torch.randn(rank * len(on), 8), torch.randn(sum(on), rank)
    name = f"transformer.h.0.attn.{last}"
    torch.save({"model": {f"{name}.lora_A": a, f"{name}.lora_B": b}}, tmp_path / "lit_model.pth.lora")
    flags = "".join(f"lora_{k}: {bool(e)}\n".lower() for k, e in zip(("query", "key", "value"), enabled, strict=True))
    (tmp_path / "hyperparameters.yaml").write_text(f"lora_r: {rank}\nlora_alpha: 6\n{flags}")
    (tmp_path / "model_config.yaml").write_text(
        f"n_head: {heads}\nn_query_groups: {groups}\nhead_size: {size}\nn_embd: 8\n"
    )
    adapter = read_adapter(tmp_path)
    # litgpt/lora.py: each enabled part by itself, then index_copy into the rows of the fused matrix.
    delta = torch.cat([y @ x for x, y in zip(a.split(rank), b.split(on), strict=True)]) * 3.0
    per_group = heads // groups + 2
    if last == "attn" and not all(enabled):  # zero_pad returns early when nothing is to be padded
        place = torch.arange(sum(sizes)) // size % per_group
        rows = [(place < per_group - 2), (place == per_group - 2), (place == per_group - 1)]
        index = torch.cat([r.nonzero()[:, 0] for r, e in zip(rows, enabled, strict=True) if e])
    else:
        index = torch.cat([r for r, e in zip(torch.arange(sum(sizes)).split(sizes), enabled, strict=True) if e])
    expected = torch.zeros(sum(sizes), 8).index_copy(0, index, delta)
    parts = adapter.modules[name]
    assert torch.allclose(adapter.scaling[name] * parts["lora_B"].load() @ parts["lora_A"].load(), expected, atol=1e-5)
