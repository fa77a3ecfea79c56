"""What a stream measures of itself, in the text format of Prometheus: in a file, over HTTP, and for the status line."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vista.errors import ConfigError
from vista.jobs.positions import Position

BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 300, 900, 3600, 21_600, 86_400)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Seconds, counted in buckets; ``last`` for the status line."""

    def __init__(self) -> None:
        self.counts, self.sum_s, self.last_s = [0] * (len(BOUNDS_S) + 1), 0.0, 0.0

    def add(self, seconds: float) -> None:
        place = next((i for i, bound in enumerate(BOUNDS_S) if seconds <= bound), len(BOUNDS_S))
        self.counts[place] += 1
        self.sum_s += seconds
        self.last_s = seconds

    def lines(self, name: str) -> list[str]:
        total, lines = 0, []
        for bound, count in zip((*BOUNDS_S, "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum_s:.6f}", f"{name}_count {total}"]


class Metrics:
    """All that is measured. Written by the stream's thread, rendered by others."""

    def __init__(self, version: str, log: str) -> None:
        self._info = f'version="{version}",log="{_escaped(log)}"'
        self._lock = threading.Lock()
        self.from_event, self.from_arrival = Histogram(), Histogram()
        self.lag_events: dict[int, int] = {}
        self.lag_s: dict[int, float] = {}
        self.positions: dict[int, Position] = {}
        self.num_batches = self.num_retries = self.num_buffered = self.num_pending = self.num_refreshes = 0
        self.is_up = {"store": True, "source": True}
        self.port: int | None = None  # where these are served

    def set_lag(self, events: Mapping[int, int], seconds: Mapping[int, float]) -> None:
        with self._lock:
            self.lag_events, self.lag_s = dict(events), dict(seconds)

    def refreshed(self, from_event_s: float, from_arrival_s: float) -> None:
        with self._lock:
            self.num_refreshes += 1
            self.from_event.add(max(from_event_s, 0.0))
            self.from_arrival.add(max(from_arrival_s, 0.0))

    def counts(self) -> dict[str, int]:
        """Entries by what became of them, all partitions together."""
        total: dict[str, int] = {}
        for position in list(self.positions.values()):
            for name, num in position.by_outcome().items():
                total[name] = total.get(name, 0) + num
        return total

    def render(self) -> str:
        """The text format, version 0.0.4."""
        with self._lock:
            counts = self.counts()
            lines = self._family("info", "gauge", "What is streamed.", [f"vista_stream_info{{{self._info}}} 1"])
            lines += self._labelled("entries_total", "counter", "Entries by what became of them.", "outcome", counts)
            lines += self._labelled(
                "lag_events", "gauge", "Entries not yet in the states.", "partition", self.lag_events
            )
            lines += self._labelled(
                "lag_seconds", "gauge", "Age of the oldest entry not yet in the states.", "partition", self.lag_s
            )
            offsets = {number: position.next_offset for number, position in list(self.positions.items())}
            lines += self._labelled("offset", "gauge", "Where reading goes on.", "partition", offsets)
            lines += self._labelled("up", "gauge", "1 where it answered last time.", "part", self.is_up)
            for name, kind, text, value in self._plain():
                lines += self._family(name, kind, text, [f"vista_stream_{name} {value}"])
            for name, text, histogram in (
                ("freshness_seconds", "From an event's time to tokens that have it.", self.from_event),
                ("arrival_freshness_seconds", "From an event's arrival to tokens that have it.", self.from_arrival),
            ):
                lines += self._family(name, "histogram", text, histogram.lines(f"vista_stream_{name}"))
        return "\n".join(lines) + "\n"

    def _plain(self) -> list[tuple[str, str, str, int]]:
        return [
            ("batches_total", "counter", "Micro-batches stored.", self.num_batches),
            ("retries_total", "counter", "Attempts after which store or source was waited for.", self.num_retries),
            ("refreshes_total", "counter", "Times a user's tokens were written.", self.num_refreshes),
            ("buffered_entries", "gauge", "Entries read and not yet stored: a micro-batch at most.", self.num_buffered),
            ("pending_users", "gauge", "Users whose states are ahead of their tokens.", self.num_pending),
        ]

    def _family(self, name: str, kind: str, text: str, samples: list[str]) -> list[str]:
        return [f"# HELP vista_stream_{name} {text}", f"# TYPE vista_stream_{name} {kind}", *samples]

    def _labelled(self, name: str, kind: str, text: str, label: str, values: Mapping[Any, float]) -> list[str]:
        samples = [f'vista_stream_{name}{{{label}="{key}"}} {_number(value)}' for key, value in values.items()]
        return self._family(name, kind, text, samples)


def _number(value: float) -> str:
    return f"{value:.3f}".removesuffix(".000")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Put the text into a file in one step, as Prometheus' node exporter wants it. Raises OSError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(metrics.render())
    partial.replace(path)


class MetricsServer:
    """Answers GET /metrics on a port of all addresses until it is closed; port 0 takes a free one."""

    def __init__(self, metrics: Metrics, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_known = self.path.split("?")[0] in ("/metrics", "/")
                body = metrics.render().encode() if is_known else b"not here: /metrics\n"
                self.send_response(200 if is_known else 404)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """The terminal has a status line."""

        try:
            self._server = ThreadingHTTPServer(("", port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--metrics-port {port}: cannot be listened to ({error}); choose another") from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
