"""A training or evaluation batch: stretches of some users' timelines, with the requests that fall into them.

Shape letters: B lanes (users in the batch), N event rows, G segments, S events in a segment, M summaries, K summary
tokens, R raw events, Q requests, C candidates, T tasks, X context columns, F count features, P windows, W events
of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from vista.models.inputs import Events, Progress, TensorGroup
from vista.models.memory import Running

LayerMemory = tuple[Running, ...]  # one running value per memory of a layer
Memory = tuple[LayerMemory, ...]  # one per layer


@dataclass(frozen=True)
class Requests(TensorGroup):
    """Q requests, each with up to C candidates and R raw events: as many as the model reads.

    summary       (Q,) int64: the row of the summary tokens to read
    recent        (Q, R) int64: rows of the event vectors, newest last; -1 pads
    recent_item   (Q, R) int64: their item indices; 0 pads
    recent_us     (Q, R) int64: their timestamps
    timestamp_us  (Q,) int64
    num_known     (Q,) int64: events of the user before the request
    candidate     (Q, C) int64 item index; 0 pads
    context       (Q, C, X) float32
    counts        (Q, C, F) float32 exact counts, or None where the model does not read them
    """

    summary: Tensor
    recent: Tensor
    recent_item: Tensor
    recent_us: Tensor
    timestamp_us: Tensor
    num_known: Tensor
    candidate: Tensor
    context: Tensor
    counts: Tensor | None = None

    def rows(self, chosen: slice | Tensor) -> Requests:
        """Some of the requests."""
        values = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **{name: value[chosen] for name, value in values.items()})

    def newest(self, size: int) -> Requests:
        """The same with the newest ``size`` of the raw events alone."""
        start = self.recent.shape[1] - size
        names = ("recent", "recent_item", "recent_us")
        return replace(self, **{name: getattr(self, name)[:, start:] for name in names})

    def candidates(self, chosen: slice) -> Requests:
        """The same with some of the candidates alone."""
        counts = None if self.counts is None else self.counts[:, chosen]
        return replace(self, candidate=self.candidate[:, chosen], context=self.context[:, chosen], counts=counts)


@dataclass(frozen=True)
class Borders(TensorGroup):
    """The M segment borders at which a batch reads summaries.

    row       (M,) int64: < B the lane's memory as it was carried in; B + g after segment g of the batch
    progress  as of each border
    lane      (M,) int64
    """

    row: Tensor
    progress: Progress
    lane: Tensor


@dataclass(frozen=True)
class Windows(TensorGroup):
    """P reconstruction windows: index (P, W) int64 rows into events (-1 pads), summary (P,) the tokens to use."""

    events: Events
    index: Tensor
    summary: Tensor


@dataclass(frozen=True)
class TimelineBatch(TensorGroup):
    """A stretch of the histories of B users (lanes), with the requests that fall into it.

    events         lane after lane: the last events before the stretch, for the first recent windows, then the stretch
    segment        (G, S) int64 rows into events: the closed segments of the stretch, lane after lane
    num_segments   (B,) int64
    borders        where summaries are read
    requests       what is scored; ``requests.summary`` is a row of borders
    label          (Q, C, T) float32, and impression (Q, C) int64: row in the split's impressions, -1 pads
    windows        reconstruction windows, or None
    """

    events: Events
    segment: Tensor
    num_segments: Tensor
    borders: Borders
    requests: Requests
    label: Tensor
    impression: Tensor
    windows: Windows | None = None

    @property
    def is_valid(self) -> Tensor:
        """(Q, C) bool."""
        return self.impression >= 0


@dataclass(frozen=True)
class Output:
    """What a model makes of a batch.

    logits          (Q, C, T)
    memory          each lane's memory after the batch
    reconstruction  (P,) mean squared error per window, or None
    auxiliary       (Q, C, T) logits of a second head that is trained with the first and never scored, or None
    """

    logits: Tensor
    memory: Memory
    reconstruction: Tensor | None = None
    auxiliary: Tensor | None = None


def flatten(memory: Memory) -> list[Tensor]:
    """Every tensor of a memory, in a fixed order."""
    return [t for layer in memory for running in layer for t in running]


def unflatten(tensors: list[Tensor], like: Memory) -> Memory:
    """The reverse of ``flatten``, with the structure of ``like``."""
    queue = iter(tensors)
    return tuple(tuple(tuple(next(queue) for _ in running) for running in layer) for layer in like)
