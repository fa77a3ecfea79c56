"""Where a model computes: the CPU, or a GPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from vista.errors import ConfigError


def chosen_device(name: str) -> torch.device:
    """The device of that name: ``cpu``, ``cuda`` (of torchrun's processes on one machine, each its own) or ``cuda:1``.

    A GPU is made the current one of this process.
    Raises ConfigError for a name that is none, and for a GPU that torch does not have.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r}: cpu, cuda or cuda:NUMBER") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"--device {name!r}: cpu, cuda or cuda:NUMBER")
    there = torch.cuda.device_count()
    number = device.index if ":" in name else int(os.environ.get("LOCAL_RANK", 0))
    if number >= there:
        found = f"torch has {there} of them" if there else "torch has none (vista doctor says why)"
        raise ConfigError(f"--device {name!r}: GPU number {number} is not there, {found}; use cpu")
    torch.cuda.set_device(number)  # where nccl and Triton look
    return torch.device("cuda", number)


GENERATORS = ("rng", "rng_cuda")  # what generator_states may name


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The random generators that a training on ``device`` draws from, by name, as tensors in main memory."""
    states = {"rng": torch.get_rng_state()}
    return states | ({"rng_cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generators(states: dict[str, Tensor], device: torch.device) -> bool:
    """Put back what ``generator_states`` gave; whether all that ``device`` needs was there, else nothing is changed."""
    if states.keys() < generator_states(device).keys():
        return False
    torch.set_rng_state(states["rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["rng_cuda"], device)
    return True
