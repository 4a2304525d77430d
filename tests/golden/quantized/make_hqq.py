"""Record zero points that HQQ finds: hqq.safetensors. In an environment with `pip install hqq==0.2.8.post1`:

python tests/golden/quantized/make_hqq.py
"""

from pathlib import Path

import torch
from hqq.core.optimize import optimize_weights_proximal_legacy
from safetensors.torch import save_file

BITS = (2, 3, 4, 8)
generator = torch.Generator().manual_seed(0)
tensors = {}
for bits in BITS:
    weight = torch.randn((6, 48), generator=generator) * 0.05
    weight[2, 5] = 0.6  # an outlier
    weight[3] += 0.1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale)
    # Each group alone: the library stops by the mean error of all that it is given.
    found = [
        optimize_weights_proximal_legacy(row, 1 / s, z, [0, 2**bits - 1], axis=1)[2]
        for row, s, z in zip(weight.split(1), scale.split(1), zero.split(1), strict=True)
    ]
    tensors |= {
        f"{bits}.weight": weight,
        f"{bits}.scale": scale,
        f"{bits}.start": zero,
        f"{bits}.zero": torch.cat(found),
    }
save_file(tensors, Path(__file__).with_name("hqq.safetensors"))
