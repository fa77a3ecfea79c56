"""Which form of an operator runs: Triton's kernels on a GPU where Triton is installed, tiles on a CPU, else torch.

Kernels take float32, bfloat16 and float16; sums are float32 in all of them. float64, the reference of tests, and heads
wider than WIDEST go through tiles or torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

WIDEST = 64  # head width: tiles of float32 then fit the shared memory (99 KB) of any GPU that is new enough
LEAST_CAPABILITY = (8, 0)  # of the GPU: the first whose matrix units take bfloat16
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SWITCH = "VISTA_KERNELS"  # of the environment; 0 turns kernels off
_devices = {"cuda"}
_tiled = {"cpu"}


def uses_kernels(*tensors: Tensor) -> bool:
    """Whether an operator on these tensors, the head width in the last dimension of each, runs kernels."""
    return (
        tensors[0].device.type in _devices
        and all(t.dtype in TYPES and t.shape[-1] <= WIDEST + 1 for t in tensors)  # + 1: a slot's denominator
        and (tensors[0].device.type != "cuda" or not why_torch())
    )


def uses_tiles(*tensors: Tensor) -> bool:
    """Whether an operator on these tensors, for which no kernel runs, runs `vista.ops.tiled`."""
    return all(t.device.type in _tiled for t in tensors)


@functools.cache
def why_torch() -> str:
    """Why no kernel runs on this installation, and what would change that; empty where they do."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 in the environment turns them off"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'vista-recsys[gpu]' (Linux)"
    if not torch.cuda.is_available():
        return "no usable GPU"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return "the GPU has compute capability {}.{}, kernels need {}.{}".format(*capability, *LEAST_CAPABILITY)
    return ""


@contextlib.contextmanager
def kernels_on(*devices: str) -> Iterator[None]:
    """Within it, kernels run on devices of these types alone: none for torch everywhere, "cpu" for the interpreter."""
    before = set(_devices)
    _devices.clear()
    _devices.update(devices)
    try:
        yield
    finally:
        _devices.clear()
        _devices.update(before)
