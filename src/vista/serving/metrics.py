"""What the server counts and times, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()  # a second series per counter, which nobody asks for

STAGE_BUCKETS_S = (.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1.0, 2.5, 5.0)  # fmt: skip
FRESHNESS_BUCKETS_S = (1, 10, 60, 600, 3600, 21_600, 86_400, 604_800, 2_592_000, 31_557_600)  # fmt: skip
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """One registry per server, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("vista_requests", "Requests by endpoint and code.", ["endpoint", "code"], registry=own)
        self.stage = Histogram(
            "vista_stage_seconds", "Time of a request by stage: queue, read, score, total.",
            ["endpoint", "stage"], buckets=STAGE_BUCKETS_S, registry=own,
        )  # fmt: skip
        self.batch_users = Histogram("vista_batch_users", "Users ranked together.", buckets=BATCH_BUCKETS, registry=own)
        self.misses = Counter("vista_store_misses", "Users ranked that the store does not know.", registry=own)
        self.store_errors = Counter("vista_store_errors", "Readings and writes that the store refused.", registry=own)
        self.degraded = Counter("vista_degraded", "Answers from an empty history, the store being away.", registry=own)
        self.freshness = Histogram(
            "vista_freshness_seconds", "Age of the newest event known of a user who is ranked.",
            buckets=FRESHNESS_BUCKETS_S, registry=own,
        )  # fmt: skip
        self.events = Counter("vista_events", "Events posted, by what became of them.", ["outcome"], registry=own)
        self.dropped = Counter("vista_dropped", "Work not begun: its deadline had passed.", ["queue"], registry=own)
        self.turned_away = Counter("vista_connections_refused", "HTTP connections beyond the most.", registry=own)
        self.depth = Gauge("vista_queue_depth", "Requests waiting.", ["queue"], registry=own)
        self.model = Gauge("vista_model_info", "1 for the model version that answers.", ["version"], registry=own)
        self.switches = Counter("vista_switches", "Changes to another model version.", registry=own)
        self.ready = Gauge("vista_ready", "Whether /readyz says yes.", registry=own)

    def serve_version(self, version: str) -> None:
        """Say which version answers from now on."""
        self.model.clear()
        self.model.labels(version).set(1)

    def watch_depth(self, queue: str, depth: Callable[[], float]) -> None:
        self.depth.labels(queue).set_function(depth)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
