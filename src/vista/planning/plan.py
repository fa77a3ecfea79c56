"""How large a cluster must be: a handful of formulas over bytes of a user's records and what one core does.

docs/scaling.md explains each line. Everything is an average times ``peak``, where machines are counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from vista.errors import ConfigError
from vista.planning.rates import Rates
from vista.planning.sizes import HISTORY_BYTES, UserBytes, kept_bytes

DAY_S, HOUR_S = 86_400, 3_600
KB, GB, TB = 1e3, 1e9, 1e12
BITS = 8


@dataclass(frozen=True)
class Demand:
    """What the cluster is for.

    users; events_per_day, requests_per_day: of each user; history: events of a user so far; refresh_s: a user's new
    events are taken in together, once in so many seconds; replicas: of everything stored; peak: the busiest time, in
    multiples of the average; engine: lmdb (in the machines that rank, each replica reads the log by itself) or redis
    (servers, written and read over the network). Raises ConfigError for what is not above 0.
    """

    users: float
    events_per_day: float
    history: float = 10_000.0
    requests_per_day: float = 20.0
    refresh_s: float = 7_200.0
    replicas: float = 2
    peak: float = 2.0
    engine: str = "lmdb"

    def __post_init__(self) -> None:
        _check_above_zero(self)
        kept_bytes(self.engine, 1)


@dataclass(frozen=True)
class Machine:
    """One machine: disk_gb_per_s is what its disks can write, day in, day out. Raises ConfigError."""

    cores: float = 32
    memory_gb: float = 256.0
    disk_tb: float = 8.0
    disk_gb_per_s: float = 1.0
    network_gbit: float = 25.0

    def __post_init__(self) -> None:
        _check_above_zero(self, "machine_")


@dataclass(frozen=True)
class Line:
    """One number of a plan: its name, its value in ``unit``, and how it is made."""

    name: str
    value: float
    unit: str
    formula: str


@dataclass(frozen=True)
class Plan:
    """lines by title; machines: those needed by what needs them, largest first is what binds."""

    lines: dict[str, list[Line]]
    machines: dict[str, int]

    @property
    def num_machines(self) -> int:
        return max(self.machines.values())

    @property
    def bound_by(self) -> str:
        """What takes most machines."""
        return max(self.machines, key=self.machines.__getitem__)

    def value(self, name: str) -> float:
        """Of the line of this name."""
        return next(line.value for lines in self.lines.values() for line in lines if line.name == name)


def _check_above_zero(settings: Any, prefix: str = "") -> None:
    for f in fields(settings):
        value = getattr(settings, f.name)
        if not isinstance(value, str) and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"--{(prefix + f.name).replace('_', '-')} {value:g}: it must be above 0")


def make_plan(demand: Demand, user: UserBytes, rates: Rates, machine: Machine, gpu_events_per_s: float = 0.0) -> Plan:
    """The cluster. gpu_events_per_s: what one GPU folds in bulk, 0 where that is not known."""
    lines = {
        "stored": _stored(demand, user),
        "refreshed": _refreshed(demand, user, rates),
        "read": _read(demand, user, rates),
    }
    plan = Plan(lines, {})
    plan.machines.update(_machines(demand, plan, machine))
    lines["a new model version"] = _rebuilt(demand, user, rates, plan.num_machines * machine.cores, gpu_events_per_s)
    return plan


def _stored(demand: Demand, user: UserBytes) -> list[Line]:
    each = {kind: kept_bytes(demand.engine, getattr(user, kind)) for kind in ("tokens", "state")}
    all_users = demand.users * demand.replicas
    where = "on disk" if demand.engine == "lmdb" else "in memory"
    return [
        Line("tokens record", user.tokens / KB, "kB", "of a user, encoded"),
        Line("state record", user.state / KB, "kB", "of a user, encoded"),
        Line("tokens", all_users * each["tokens"] / TB, "TB", f"users x replicas x {each['tokens']:,} bytes kept"),
        Line("states", all_users * each["state"] / TB, "TB", f"users x replicas x {each['state']:,} bytes kept"),
        Line("stored", all_users * sum(each.values()) / TB, "TB", f"both, {where}"),
        Line("histories", demand.users * demand.history * HISTORY_BYTES / TB, "TB",
             f"users x history x {HISTORY_BYTES} bytes: prepared data, for a new model version"),
    ]  # fmt: skip


def _refreshed(demand: Demand, user: UserBytes, rates: Rates) -> list[Line]:
    in_interval = demand.events_per_day * demand.refresh_s / DAY_S
    per_s = demand.users * -math.expm1(-in_interval) / demand.refresh_s
    events_per_s = demand.users * demand.events_per_day / DAY_S
    is_embedded = demand.engine == "lmdb"
    writers = demand.replicas if is_embedded else 1
    cores = writers * (per_s * rates.refresh_ms / 1e3 + events_per_s * rates.refresh_event_us / 1e6)
    written = per_s * user.both * demand.replicas
    log = events_per_s * user.event * writers
    network = log if is_embedded else log + per_s * user.both + written
    return [
        Line("events", events_per_s, "/s", "users x events per day"),
        Line("refreshes", per_s, "/s", "users x (1 - exp(-events in an interval)) / interval"),
        Line("refresh cores", cores, "cores",
             ("replicas x " if is_embedded else "") + "(refreshes x refresh-ms + events x refresh-event-us)"),
        Line("refresh disk", written * rates.write_amplification / GB, "GB/s",
             "refreshes x both records x replicas x write-amplification"),
        Line("refresh network", network / GB, "GB/s",
             f"events x {user.event} bytes" + (" x replicas" if is_embedded
              else " + refreshes x both records x (1 read + replicas written)")),
    ]  # fmt: skip


def _read(demand: Demand, user: UserBytes, rates: Rates) -> list[Line]:
    per_s = demand.users * demand.requests_per_day / DAY_S
    network = per_s * user.tokens / GB if demand.engine == "redis" else 0.0
    return [
        Line("reads", per_s, "/s", "users x requests per day"),
        Line("read cores", per_s * rates.read_us / 1e6, "cores", "reads x read-us"),
        Line("read network", network, "GB/s",
             "reads x tokens record" if network else "none: a request goes to a machine that has the user"),
    ]  # fmt: skip


def _machines(demand: Demand, plan: Plan, machine: Machine) -> dict[str, int]:
    """By what each of a machine's means alone would need."""
    peak = demand.peak
    place = machine.disk_tb if demand.engine == "lmdb" else machine.memory_gb * GB / TB
    network = (plan.value("refresh network") + plan.value("read network")) * BITS
    needed = {
        "replicas": demand.replicas,
        "room": plan.value("stored") / place,
        "disk writes": plan.value("refresh disk") * peak / machine.disk_gb_per_s,
        "cores": (plan.value("refresh cores") + plan.value("read cores")) * peak / machine.cores,
        "network": network * peak / machine.network_gbit,
    }
    return {name: math.ceil(number) for name, number in needed.items()}


def _rebuilt(demand: Demand, user: UserBytes, rates: Rates, cores: float, gpu_events_per_s: float) -> list[Line]:
    events = demand.users * demand.history
    core_s = events * rates.bulk_event_us / 1e6 + demand.users * rates.bulk_user_ms / 1e3
    lines = [
        Line("core hours", core_s / HOUR_S, "h", "users x (history x bulk-event-us + bulk-user-ms)"),
        Line("on these machines", core_s / HOUR_S / cores, "h", "core hours / all their cores"),
        Line(
            "records written", demand.users * user.both * demand.replicas / TB, "TB", "users x both records x replicas"
        ),
    ]
    if gpu_events_per_s:
        lines.append(Line("GPU hours", events / gpu_events_per_s / HOUR_S, "h", "users x history / gpu-events-per-s"))
    return lines
