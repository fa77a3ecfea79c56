"""What one core does in a second: measured numbers, in one place.

Each entry is what ``python bench/plan.py --size SIZE`` printed (docs/scaling.md has the lines): processor time of one
thread, so that the work of others counts for little; what a core loses of its caches to them is in it. Whoever plans
for other machines, or other settings, runs the same command there and gives what it prints to ``vista plan``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from vista.config import SIZES, ModelConfig, resolve
from vista.errors import ConfigError


@dataclass(frozen=True)
class Rates:
    """Of one model, on one core; processor time but for bytes; in the order in which bench/plan.py prints them.

    bulk_event_us, bulk_user_ms: `vista summarize` takes so much per event of a history and beside that per user;
    refresh_ms, refresh_event_us: `vista stream` takes so much per user with new events in a micro-batch (state read,
    state and tokens written) and beside that per event; write_amplification: bytes that LMDB writes per byte of record,
    in these micro-batches; read_us: a user's tokens read from the store and decoded, 64 users at a time.
    """

    bulk_event_us: float
    bulk_user_ms: float
    refresh_ms: float
    refresh_event_us: float
    write_amplification: float
    read_us: float

    def __post_init__(self) -> None:
        """Raises ConfigError for a rate that none can be."""
        for name in RATE_NAMES:
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: it must be above 0")


RATE_NAMES = tuple(f.name for f in fields(Rates))

MEASURED = {
    "tiny": Rates(1.875, 0.3228, 0.6647, 96.05, 1.399, 20.64),
    "small": Rates(2.355, 0.4906, 0.5763, 57.89, 1.166, 17.5),
    "base": Rates(11.05, 2.112, 1.144, 68.45, 1.02, 26.06),
}

COST_SETTINGS = (
    "attention", "memory", "segment_events", "num_layers", "num_seeds", "width", "num_heads", "sketch_slots",
    "sketch_traces", "sketch_predecessors", "recent_events", "expansion",
)  # fmt: skip


@dataclass(frozen=True)
class ChosenRates:
    """rates: to plan with; size: where those that were not given were measured; is_near: the model is not of that
    size; given: names of rates that were given."""

    rates: Rates
    size: str
    is_near: bool
    given: tuple[str, ...]


def rates_for(config: ModelConfig, given: dict[str, float]) -> ChosenRates:
    """The rates of the measured size whose settings these are, else of the nearest by width; ``given`` ones instead."""
    sizes = {size: resolve(size).model for size in SIZES if size in MEASURED}
    same = [size for size, own in sizes.items() if all(getattr(own, n) == getattr(config, n) for n in COST_SETTINGS)]
    nearest = min(sizes, key=lambda size: abs(math.log(sizes[size].width / config.width)))
    size = same[0] if same else nearest
    return ChosenRates(replace(MEASURED[size], **given), size, not same and len(given) < len(RATE_NAMES), tuple(given))
