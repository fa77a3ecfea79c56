"""On what a benchmark was run: the machine and the versions, as its report states them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

DISTRIBUTION = "vista-recsys"
PACKAGES = ("torch", "numpy", "polars")
CPU_FILE = Path("/proc/cpuinfo")
GIB = 1 << 30


def machine() -> str:
    """Processor, cores, memory, system and threads in one line."""
    memory = _memory_bytes()
    parts = [
        _processor(),
        f"{os.cpu_count()} cores",
        *([f"{memory / GIB:.0f} GiB"] if memory else []),
        platform.platform(aliased=True, terse=True),
        f"{torch.get_num_threads()} thread(s) of torch",
    ]
    return ", ".join(parts)


def versions() -> str:
    """This package, Python and what the numbers depend on."""
    others = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"vista {version(DISTRIBUTION)}, Python {platform.python_version()}, {others}"


def _processor() -> str:
    """Its name where the system tells it, else its kind."""
    lines = CPU_FILE.read_text().splitlines() if CPU_FILE.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
