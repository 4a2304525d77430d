"""A session that reads and writes torch tensors where they lie."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

from llmkit.errors import InputError, is_memory_error
from llmkit.lazy_imports import torch

# torch's name -> ONNX's number of the element type
ELEMENTS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11,
             "bfloat16": 16}  # fmt: skip
_NAMES = {"tensor(float)": "float32", "tensor(double)": "float64"}


# Where in its own sources an error came up, with the signature of the function there.
_PLACE = re.compile(r"/onnxruntime_src/\S+:\d+ .*\) (?=[A-Z\[])")


def reason(error: Exception) -> str:
    """What ONNX Runtime says is wrong, in a line and without its own sources."""
    said = " ".join(str(error).split()) or type(error).__name__
    return _PLACE.sub("", said)[:300]


class BoundSession:
    """An ONNX Runtime session over torch tensors.

    Args:
        session: the session.
        device: where tensors lie.

    Attributes:
        inputs, outputs: names, types and shapes, as ONNX Runtime tells them.
    """

    def __init__(self, session: Any, device: torch.device) -> None:
        self.session, self.device = session, device
        self.inputs = {i.name: i for i in session.get_inputs()}
        self.outputs = {o.name: o for o in session.get_outputs()}
        self._binding = session.io_binding()
        self._bound: dict[str, weakref.ref[torch.Tensor]] = {}

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of an input or output."""
        stated = (self.inputs.get(name) or self.outputs[name]).type
        dtype: torch.dtype = getattr(torch, _NAMES.get(stated, stated[len("tensor(") : -1]))
        return dtype

    def run(
        self, feeds: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """One call; the outputs by name.

        Args:
            feeds: a tensor for each input.
            into: outputs that are written into tensors of the caller's.
            sizes: free dimensions by name, from which other outputs' shapes follow. Where that is not enough, ONNX
                Runtime makes the output, and it is copied.

        Raises:
            InputError: ONNX Runtime refuses the call: the graph's nodes do not take these shapes or values.
        """
        try:
            return self._run(feeds, into, sizes)
        except Exception as error:
            is_runtime = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")
            if not is_runtime or is_memory_error(error):
                raise
            raise InputError(
                f"ONNX Runtime cannot run the graph: {reason(error)}", hint="export the model again"
            ) from error

    def _run(
        self, feeds: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        binding = self._binding
        copies = []
        for name, feed in feeds.items():
            if self._is_new(name, feed):
                placed = feed.to(self.device).contiguous()
                binding.bind_input(name, *self._place(placed))
                if placed is not feed:  # it lives for this call only
                    copies.append(placed)
                    del self._bound[name]
        results, unknown = {}, []
        for name, output in self.outputs.items():
            tensor = into.get(name)
            if tensor is None:
                tensor = self._empty(name, output.shape, sizes)
            if tensor is None:
                binding.bind_output(name, "cpu")
                self._bound.pop(name, None)
                unknown.append(name)
            else:
                results[name] = tensor
                if self._is_new(name, tensor):
                    binding.bind_output(name, *self._place(tensor))
        if self.device.type != "cpu":
            binding.synchronize_inputs()
        self.session.run_with_iobinding(binding)
        if self.device.type != "cpu":
            binding.synchronize_outputs()
        if unknown:
            values = dict(zip(self.outputs, binding.get_outputs(), strict=True))
            results |= {name: torch.from_numpy(values[name].numpy()).to(self.device) for name in unknown}
        return results

    def _is_new(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a name is not bound to this very tensor yet; it counts as bound to it from now on.

        Keys and values stay where they are from step to step: to bind all of them anew takes longer than a small layer.
        """
        bound = self._bound.get(name)
        if bound is not None and bound() is tensor:
            return False
        self._bound[name] = weakref.ref(tensor)
        return True

    def _empty(self, name: str, shape: list[Any], sizes: Mapping[str, int]) -> torch.Tensor | None:
        dims = [n if isinstance(n, int) else sizes.get(n) for n in shape]
        if any(n is None for n in dims):
            return None
        return torch.empty([int(n or 0) for n in dims], dtype=self.dtype_of(name), device=self.device)

    def _place(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Device, element type, shape and address, as binding takes them."""
        element = ELEMENTS[str(tensor.dtype).removeprefix("torch.")]
        # what is empty has no address, which ONNX Runtime wants all the same
        at = tensor if tensor.numel() else torch.empty(1, device=tensor.device)
        return self.device.type, self.device.index or 0, element, list(tensor.shape), at.data_ptr()
