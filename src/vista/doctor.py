"""What an installation can do: versions, device, threads, memory, CPU features, operators, optional packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vista.ops import qla, slots
from vista.ops.forms import why_torch
from vista.ops.order import SegmentOrder

DISTRIBUTION = "vista-recsys"
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")
HEAD_WIDTH, ROWS, SOURCES = 8, 32, 24  # of the operators' test
TOLERANCE = 1e-4  # float32 forms of one formula: only the order of additions differs


@dataclass(frozen=True)
class Check:
    """One line of the report. state: ok, absent (allowed, with the reason) or wrong."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class Report:
    """Everything ``vista doctor`` shows."""

    system: dict[str, str]
    packages: dict[str, str]
    operators: tuple[Check, ...]
    optional: tuple[Check, ...]

    @property
    def is_healthy(self) -> bool:
        return all(check.state != "wrong" for check in self.operators)

    def describe(self) -> str:
        """The report as text, one aligned block per part."""
        parts = [
            ("system", list(self.system.items())),
            ("packages", list(self.packages.items())),
            ("operators", [(check.name, f"{check.state}: {check.detail}") for check in self.operators]),
            ("optional packages", [(check.name, f"{check.state}: {check.detail}") for check in self.optional]),
        ]
        width = max(len(name) for _, rows in parts for name, _ in rows)
        return "\n\n".join(
            "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]) for title, rows in parts
        )


def examine() -> Report:
    """Look at this installation. Runs each operator once on a few numbers; takes a second or two."""
    return Report(
        system=_system(),
        packages=_required_packages(),
        operators=_operators(),
        optional=_optional_packages(),
    )


def _system() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "device": _device(),
        "threads": f"{torch.get_num_threads()} in torch, {len(_usable_cores())} cores usable, {os.cpu_count()} present",
        "memory": _memory(),
        "cpu features": _cpu_features(),
        "torch on cpu": _torch_on_cpu(),
        "bfloat16": _bfloat16(),
    }


def _device() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        return "cpu (this torch is a build without CUDA)"
    return f"cpu (torch is built for CUDA {torch.version.cuda}, but no usable GPU or driver was found)"


def _usable_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _memory() -> str:
    try:
        fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
        total, free = int(fields["MemTotal"]) / 2**20, int(fields["MemAvailable"]) / 2**20
    except (OSError, KeyError):
        return "unknown (no /proc/meminfo on this system)"
    limit = _container_limit_gib()
    return f"{total:.1f} GiB, {free:.1f} GiB available" + (f", limited to {limit:.1f} GiB here" if limit else "")


def _container_limit_gib() -> float:
    """The memory limit of the control group, GiB; 0 where there is none."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return 0.0
    return int(limit) / 2**30 if limit.isdigit() else 0.0


def _cpu_features() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown (no /proc/cpuinfo on this system)"
    flags = set(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)[0].split()) if text else set()
    return " ".join(name for name in CPU_FEATURES if name in flags) or "none of " + " ".join(CPU_FEATURES)


def _bfloat16() -> str:
    if torch.cuda.is_available():
        return "in hardware" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated: slower"
    flags = _cpu_features().split()
    native = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags]
    return f"in hardware ({native[0]})" if native else "emulated: slower than float32 on this CPU"


def _torch_on_cpu() -> str:
    return (
        f"{torch.backends.cpu.get_cpu_capability()}, oneDNN {'on' if torch.backends.mkldnn.is_available() else 'off'}"
    )


def _operators() -> tuple[Check, ...]:
    """The forms of each operator: those in use are compared with their definitions here and now."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    form = "torch" if why_torch() else "Triton kernels"
    return (
        _compare("qla", f"torch, on {device}", _qla_difference(device)),
        _compare("segment-causal qla", f"{form}, on {device}", _segment_causal_difference(device)),
        _compare("slots", f"{form}, on {device}", _slots_difference(device)),
        Check("fused GPU kernels", "absent" if why_torch() else "ok", why_torch() or "used for tensors on the GPU"),
    )


def _compare(name: str, form: str, difference: float) -> Check:
    state = "ok" if difference < TOLERANCE else "wrong"
    return Check(name, state, f"{form}; differs from its definition by {difference:.0e} at most (float32)")


def _qla_difference(device: str) -> float:
    q, k, v = _three_tensors()  # the first rows are the sources, the last the targets
    here = [t[rows] for rows in (slice(0, SOURCES), slice(SOURCES, ROWS)) for t in (q, k, v)]
    there = [t.to(device) for t in here]
    fast = qla.qla(there[0], there[1], there[2], there[3], there[4], there[5])
    naive = qla.qla_naive(here[0], here[1], here[2], here[3], here[4], here[5])
    return max(_difference(a, b) for a, b in zip(fast, naive, strict=True))


def _segment_causal_difference(device: str) -> float:
    segment_events = 8
    q, k, v = _three_tensors()
    order = SegmentOrder.of(torch.tensor([ROWS // segment_events]))
    segments = [t.view(-1, 1, segment_events, HEAD_WIDTH).to(device) for t in (q, k, v)]
    memory = torch.zeros(1, 1, HEAD_WIDTH, HEAD_WIDTH, device=device)
    fast, _, _ = qla.segment_causal_qla(segments[0], segments[1], segments[2], memory, order)
    return _difference(fast.flatten(0, 2), qla.segment_causal_qla_naive(q, k, v, segment_events)[0])


def _slots_difference(device: str) -> float:
    q, k, v = _three_tensors()
    keys, values = (t.view(1, 1, ROWS, HEAD_WIDTH).to(device) for t in (k, v))
    is_valid = torch.ones(1, ROWS, dtype=torch.bool, device=device)
    sums, _ = slots.slot_parts(q[None].to(device), keys, values, is_valid)
    return _difference(sums[0, 0, :, :-1] / sums[0, 0, :, -1:], slots.slot_reads_naive(q, k, v)[0])


def _three_tensors() -> list[Tensor]:
    """Queries, keys and values, (ROWS, HEAD_WIDTH) float32 each; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, HEAD_WIDTH, generator=generator) for _ in range(3)]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found.cpu() - expected).abs().max() / expected.abs().max())


def _required_packages() -> dict[str, str]:
    names = [DISTRIBUTION, *(name for name, extra in _requirements() if not extra)]
    return {name: _version(name) or "not installed" for name in names}


def _optional_packages() -> tuple[Check, ...]:
    """What the extras of the distribution add, and which of it is here."""
    checks = []
    for name, extra in _requirements():
        if extra:
            found = _version(name)
            checks.append(Check(name, "ok" if found else "absent", found or f"pip install '{DISTRIBUTION}[{extra}]'"))
    return tuple(checks)


def _requirements() -> list[tuple[str, str]]:
    """(package, extra or empty) of each requirement, as the installed distribution declares them."""
    lines = importlib.metadata.requires(DISTRIBUTION) or []
    return [
        (re.split(r"[^\w.-]", line)[0], next(iter(re.findall(r"extra == ['\"]([\w-]+)['\"]", line)), ""))
        for line in lines
    ]


def _version(name: str) -> str:
    """Installed version of a distribution, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
