"""A device that is not there, computed on the CPU: what it finds out, a GPU would, too, and no GPU is needed.

Tensors of the stand-in say that they are on the device ``meta``. Within ``stand_in()`` whatever is made there or moved
there is one; every operator on them computes on the CPU, so that numbers are those of the CPU to the last bit. An
operator on tensors of both devices is refused as a GPU refuses it, and so is numpy.

It cannot do what torch decides by device before it dispatches: sparse gradients, autocast and fused attention are
turned off, on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
# Index tensors of a GPU's tensor may lie in main memory.
MAY_MIX = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.copy_.default}


class There(Tensor):
    """A tensor of the stand-in; ``held`` has its numbers, in main memory."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor of another device is no numpy array; use .cpu()")

    __array__ = numpy

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held})"


def is_stand_in(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator: computed on what is held, and wrapped where it was there."""
    leaves = tree_leaves((args, kwargs))
    is_there = any(isinstance(x, There) for x in leaves)
    here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, There) and x.dim() > 0]
    if is_there and here and func not in MAY_MIX:
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"{func}: expected all tensors on one device, but those of shapes {shapes} are on the CPU")
    target = kwargs.get("device")
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    held_args, held_kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    stays = is_there if target is None else is_stand_in(target)
    if func is aten.copy_.default:
        return args[0]
    if not stays or not any(isinstance(x, Tensor) for x in tree_leaves(out)):
        return out
    if func is aten._to_copy.default or not is_there:
        return tree_map(There, out)
    wrapped = tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Tensors made of Python's numbers come into being below what a dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_stand_in(kwargs.get("device")):
            return func(*args, **(kwargs | {"device": "cpu"})).to(DEVICE)
        if func is Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def stand_in() -> Iterator[torch.device]:
    """Within it there is the device that is yielded."""
    make, autocast = nn.Embedding.__init__, torch.autocast

    def dense(self: nn.Embedding, *args: Any, sparse: bool = False, **kwargs: Any) -> None:
        make(self, *args, **kwargs)

    def no_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if is_stand_in(device_type) else autocast(device_type, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.Embedding, "__init__", dense))
        stack.enter_context(patch.object(torch, "autocast", no_autocast))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch())
        yield DEVICE
