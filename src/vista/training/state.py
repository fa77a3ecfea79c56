"""What a training loop needs to stop and to go on: optimizer states as named tensors, and an end between steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor


def pack_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of optimizers as tensors ``optimizer.NUMBER.PARAMETER.NAME``."""
    return {
        f"optimizer.{index}.{parameter}.{name}": torch.as_tensor(value)
        for index, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def unpack_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Put back what ``pack_optimizers`` gave."""
    for index, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for path, value in under(f"optimizer.{index}.", tensors).items():
            parameter, name = path.split(".", 1)
            state.setdefault(int(parameter), {})[name] = _as_saved(optimizer, name, value)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _as_saved(optimizer: torch.optim.Optimizer, name: str, value: Tensor) -> Any:
    # SparseAdam counts its steps in a plain integer, AdamW in a tensor
    return int(value) if name == "step" and isinstance(optimizer, torch.optim.SparseAdam) else value


@contextmanager
def stop_on_interrupt(is_patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C or SIGTERM only sets a flag: no step is cut in two; the second interrupts at once.

    is_patient: no second one does. A torchrun that is told to stop tells its processes, which may know already.
    """
    asked = [False]

    def handle(signum: int, frame: FrameType | None) -> None:
        if asked[0] and not is_patient:
            raise KeyboardInterrupt
        asked[0] = True

    previous: dict[int, Any] = {}
    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            previous[wanted] = signal.signal(wanted, handle)
    except ValueError:  # not the main thread: whoever owns it decides
        yield lambda: asked[0]
        return
    try:
        yield lambda: asked[0]
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
