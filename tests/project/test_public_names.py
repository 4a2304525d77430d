"""`import llmkit`: its names are listed without torch, and the Python of the documentation is true."""

from __future__ import annotations

import subprocess
import sys

import llmkit


def test_dir_lists_the_public_names_without_torch():
    script = "import llmkit, sys; print(dir(llmkit)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{sorted(llmkit.__all__)}\nFalse\n"
    assert all(hasattr(llmkit, name) for name in llmkit.__all__)


def test_a_checkpoint_is_indexed_by_names(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2, 3)}, str(tmp_path / "model.safetensors"))
    ckpt = llmkit.open_checkpoint(tmp_path)
    assert ckpt["w"].shape == (2, 3)
    assert "w" in ckpt
    assert "v" not in ckpt
    assert list(ckpt) == ["w"]
