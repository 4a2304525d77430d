"""A Llama model with rotations merged into its weights: the same function with other weights to quantize.

    python tests/bench/rotated_model.py MODEL OUT [--seed 0]
    python tests/bench/quantize_quality.py OUT SCRATCH --calibration TEXT --held TEXT …

R1 turns the residual stream: norms' weights are folded into the linear layers that read them, so that a norm commutes
with an orthogonal matrix. R2 turns the values of each head. Both are Hadamard matrices times an orthogonal matrix for
the odd factor of the width, with random signs (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406, whose R3 and R4
take work at run time). The head is untied: it takes up the last norm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from scipy.linalg import hadamard
from transformers import AutoModelForCausalLM, AutoTokenizer


def rotation(width: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix [width, width], float64."""
    even = width & -width
    odd = torch.linalg.qr(torch.randn(width // even, width // even, generator=generator, dtype=torch.float64))[
        0
    ].contiguous()
    signs = torch.randint(2, (width,), generator=generator).double() * 2 - 1
    return torch.kron(torch.from_numpy(hadamard(even)).double() / even**0.5, odd) * signs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.randint(model.config.vocab_size, (2, 64), generator=generator)
    before = model(ids).logits
    r1 = rotation(model.config.hidden_size, generator)
    embedding = model.get_input_embeddings().weight.clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(embedding * model.model.norm.weight @ r1)
    model.model.embed_tokens.weight = torch.nn.Parameter(embedding @ r1)
    model.model.norm.weight.fill_(1)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        read_by = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, readers in read_by:
            for linear in readers:
                linear.weight.copy_(linear.weight * norm.weight @ r1)
            norm.weight.fill_(1)
        r2 = rotation(attention.head_dim, generator)
        v, o = attention.v_proj.weight, attention.o_proj.weight
        v.copy_((r2.T @ v.unflatten(0, (-1, len(r2)))).flatten(0, 1))
        o.copy_((o.unflatten(1, (-1, len(r2))) @ r2).flatten(1))
        o.copy_(r1.T @ o)
        mlp.down_proj.weight.copy_(r1.T @ mlp.down_proj.weight)
    error = (model(ids).logits - before).abs().max() / before.abs().max()
    assert error < 1e-5, f"another function: logits differ by {error:.1e}"
    model.float().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: logits differ by {error:.1e} of the largest (norms are computed in float32)")


if __name__ == "__main__":
    main()
