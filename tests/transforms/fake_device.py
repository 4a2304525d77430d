"""A device that is not there: its tensors lie in memory, and mix with those of the CPU as little as CUDA's do."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "meta"  # the one device besides the CPU that torch needs no driver for; here, tensors on it have numbers
_TAKES_INDICES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class _There(torch.Tensor):
    """A tensor on the device; `elem` holds its numbers."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> _There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), elem.stride(), elem.storage_offset(), dtype=elem.dtype, device=NAME
        )
        made.elem = elem
        return made

    def tolist(self) -> Any:
        return self.elem.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"there({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on the device, in this thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in given if isinstance(x, _There)]
    moves = func.__name__.startswith(("to.", "_to_copy."))
    wanted = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)), None)
    if func is torch.ops.aten.to.other:
        wanted = args[1].device
    if there and not moves:
        strange = [x for x in given if not isinstance(x, _There) and x.dim()]
        if strange and func not in (*_TAKES_INDICES, torch.ops.aten.copy_.default):
            raise RuntimeError(f"{func}: tensors on two devices: {[(type(x).__name__, list(x.shape)) for x in given]}")
    is_there = wanted.type == NAME if wanted is not None else bool(there)
    args, kwargs = tree_map(lambda x: torch.device("cpu") if isinstance(x, torch.device) else x, (args, kwargs))
    of_elem = {id(x.elem): x for x in there}
    with torch._C._DisableTorchDispatch():
        made = func(*tree_map(_elem, args), **tree_map(_elem, kwargs))
    if not is_there:
        return made

    def out(x: Any) -> Any:
        return x if not isinstance(x, torch.Tensor) else of_elem[id(x)] if id(x) in of_elem else _There(x)

    return tree_map(out, made)


def _elem(x: Any) -> Any:
    return x.elem if isinstance(x, _There) else x
