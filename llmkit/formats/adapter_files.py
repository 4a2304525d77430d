"""Where an adapter lies: its weight file in a folder, or in the one folder below it, and its tensors by stored name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from llmkit.errors import InputError, listing
from llmkit.formats.folder import read_file
from llmkit.formats.gguf_header import GgufFile, read_header
from llmkit.formats.unreadable import read_head
from llmkit.tensors.lazy import Lazy

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_WEIGHT_NAMES = (
    WEIGHTS_NAME, "adapter_model.bin", "adapter_model.pt", "adapters.safetensors", "pytorch_model.bin",
    "model.safetensors", "pytorch_lora_weights.safetensors",
)  # fmt: skip
_OF_IMAGES = ("lora_unet_", "lora_te", "unet.", "text_encoder")
_LOOSE = (".lora", ".pth", ".pt", ".bin")
_STEP = re.compile(r"-(\d+)$")
# First bytes of the two files that llama.cpp takes adapters from.
_GGUF, _GGLA = b"GGUF", (b"ggla", b"algg")


def find_weights(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The weight file of an adapter, and what to tell the user.

    A folder without an adapter is taken for the one adapter in its subfolders: PEFT saves an adapter of another name
    than `default` into a folder of that name, trainers save into `checkpoint-N`.

    Raises:
        InputError: no adapter there, or several.
    """
    if not path.is_dir():
        return path, ()
    files = _weights_in(path)
    if files is not None:
        return files, ()
    below = sorted((p.parent for p in path.glob(f"*/{CONFIG_NAME}")), key=_step_of)
    below = [folder for folder in below if _weights_in(folder) is not None]
    if len(below) == 1:
        file = _weights_in(below[0])
        assert file is not None  # noqa: S101  (just looked at)
        return file, (f"{path} holds no adapter itself: the one in {below[0]} is taken",)
    if below:
        raise InputError(
            f"{path} holds no adapter itself, but {len(below)} folders with one: {listing(map(str, below))}",
            hint=f"give one of them, such as {below[-1]}",
        )
    raise InputError(
        f"{path} holds no adapter: found none of {', '.join(_WEIGHT_NAMES[:4])}",
        hint="give the folder that holds adapter_config.json and adapter_model.safetensors",
    )


def _weights_in(folder: Path) -> Path | None:
    for name in _WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p for p in folder.iterdir() if p.suffix in (*_LOOSE, ".gguf") and p.is_file())
    return others[0] if len(others) == 1 else None


def _step_of(folder: Path) -> tuple[int, str]:
    match = _STEP.search(folder.name)
    return (int(match[1]) if match else -1, folder.name)


def read_tensors(file: Path) -> Mapping[str, Lazy]:
    """The tensors of an adapter's file by stored name.

    Raises:
        InputError: no tensors, or a file of llama.cpp, which is named.
    """
    head = read_head(file, 4)
    if head == _GGUF and not _is_adapter(read_header(file)):
        raise InputError(
            f"{file} is a GGUF file that holds no adapter",
            hint="give the folder or file that PEFT saved the adapter in",
        )
    if head == _GGUF or head in _GGLA:
        what = "a GGUF file" if head == _GGUF else "of llama.cpp's first format (ggla)"
        raise InputError(
            f"{file} is {what}: a LoRA of llama.cpp's, which its own programs apply; llmkit merges what PEFT, "
            "lit-llama, litgpt and MLX save",
            hint="give the adapter that it was converted from (adapter_config.json and adapter_model.safetensors), or "
            "merge it with llama.cpp's llama-export-lora",
        )
    try:
        return read_file(file)
    except InputError as error:
        if file.stat().st_size < 2000 and "no tensors" in error.message:
            raise empty_adapter(str(file), {}, file.stat().st_size) from error
        raise


def _is_adapter(file: GgufFile) -> bool:
    return file.metadata.get("general.type") == "adapter" or any(
        tensor.name.endswith(".lora_a") for tensor in file.tensors
    )


def empty_adapter(label: str, tensors: Mapping[str, Lazy], nbytes: int | None = None) -> InputError:
    """The error for a file without any tensor of an adapter."""
    if any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in tensors):
        return InputError(
            f"{label} is an adapter of torchtune: its tensors are named lora_a and lora_b and its layers as in "
            f"torchtune ({listing(tensors, 1)}), where rows of q and k may be in another order than in the base",
            hint="let torchtune write PEFT's format: its checkpointers save adapter_model.safetensors and "
            "adapter_config.json beside adapter_N.pt (FullModelHFCheckpointer)",
        )
    if any(name.startswith(_OF_IMAGES) for name in tensors):
        return InputError(
            f"{label} is an adapter of an image model, as diffusers or kohya-ss name them ({listing(tensors, 1)})",
            hint="diffusers loads it: pipeline.load_lora_weights; a language model's adapter is merged here",
        )
    size = f" ({nbytes} bytes)" if nbytes is not None else ""
    if not tensors:
        return InputError(
            f"{label}{size} holds no adapter tensors: an empty adapter, which merging would silently turn into a copy "
            "of the base",
            hint="early training scripts filtered the state dict twice when saving: save again with "
            "model.save_pretrained, or take the adapter from a checkpoint-N folder of the run",
        )
    return InputError(
        f"{label}{size} holds no adapter tensors; it holds {listing(tensors, 3)}",
        hint="names as PEFT writes them end in lora_A.weight and lora_B.weight: save it with model.save_pretrained",
    )
