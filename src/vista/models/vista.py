"""The models by name, behind one interface: a `TimelineBatch` in, logits out; and, for the sequence models, their two
stages.

``vista`` is Summarizer + Ranker. ``recent`` is the same ranker without a summary: the control that shows what the
summary is worth. ``counts`` is no sequence model at all (``vista.models.counts``). The others are the field's
(``vista.models.baselines``).

Shape letters: B lanes, G segments, S events in a segment, M summaries, Q requests, C candidates, T tasks, P windows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vista.config import ModelConfig
from vista.models.baselines.base import Baseline
from vista.models.baselines.din import DIN
from vista.models.baselines.hstu import HSTU
from vista.models.baselines.pooling import MeanPooling
from vista.models.baselines.sasrec import SASRec
from vista.models.baselines.sim import SIM
from vista.models.baselines.twin import TWIN
from vista.models.batch import Memory, Output, Requests, TimelineBatch
from vista.models.counts import CountsModel
from vista.models.embeddings import EventEmbedding, ItemEmbedding, ItemTables
from vista.models.inputs import Events, Progress, Recent
from vista.models.losses import ReconstructionDecoder
from vista.models.memory import Running
from vista.models.model import Model
from vista.models.ranker import Ranker, UserCache
from vista.models.sketch import Sketch
from vista.models.summarizer import Summarizer, UserState
from vista.ops.order import SegmentOrder
from vista.schema import ContextColumn


@dataclass(frozen=True)
class Prepared:
    """Summary tokens (M, K, D) at a batch's borders, keys and values of tokens and events, and sketches (M, ...)."""

    tokens: Tensor
    cache: UserCache
    sketch: Running = ()


class SequenceModel(Model):
    """Summarizer (unless ``num_seeds`` is 0) and Ranker on one event embedding."""

    def __init__(
        self,
        config: ModelConfig,
        tables: ItemTables,
        num_actions: int,
        num_tasks: int,
        context: tuple[ContextColumn, ...],
        num_counts: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        embedding = EventEmbedding(ItemEmbedding(tables, config.width), num_actions, config.width)
        has_summary = config.kind == "vista" and config.num_seeds > 0
        self.summarizer = Summarizer(config, embedding) if has_summary else None
        # One owner, or every shared weight would stand twice in a checkpoint.
        self.own_embedding = None if has_summary else embedding
        if self.sketch is not None:
            num_counts += self.sketch.num_features
        self.ranker = Ranker(config, num_tasks, context, num_counts)
        self.decoder = ReconstructionDecoder(config) if has_summary else None

    @property
    def embedding(self) -> EventEmbedding:
        """The event embedding that both stages read."""
        embedding = self.own_embedding if self.summarizer is None else self.summarizer.embedding
        assert embedding is not None
        return embedding

    @property
    def sketch(self) -> Sketch | None:
        return self.summarizer.sketch if self.summarizer is not None else None

    # -- training and evaluation: over timelines

    def forward(self, batch: TimelineBatch, memory: Memory) -> Output:
        """Score a batch on top of the memory (B, ...) its lanes carry."""
        prepared, last = self.prepare(batch, memory)
        logits = self.rank(prepared, batch.requests)
        error = None
        if batch.windows is not None and self.decoder is not None:
            rows = batch.windows.index.clamp(min=0)
            window_x = self.embed(batch.windows.events)[rows]
            error = self.decoder(prepared.tokens[batch.windows.summary], window_x, batch.windows.index >= 0)
        return Output(logits, last, error)

    def prepare(self, batch: TimelineBatch, memory: Memory) -> tuple[Prepared, Memory]:
        """Summary tokens at the batch's borders with all keys and values, and each lane's memory after the batch."""
        event_x = self.embed(batch.events)
        tokens, at_border, last = self.summaries(batch, event_x, memory)
        sketch = at_border[-1][0] if self.sketch is not None else ()
        return Prepared(tokens, self.ranker.prepare(tokens, event_x, self._readout(at_border)), sketch), last

    def summaries(self, batch: TimelineBatch, event_x: Tensor, memory: Memory) -> tuple[Tensor, Memory, Memory]:
        """Summary tokens (M, K, D) and memories at the batch's borders, and each lane's memory after the batch.

        event_x (N, D): the vectors of the batch's events.
        """
        if self.summarizer is None:
            return event_x.new_zeros(len(batch.borders.row), 0, self.config.width), (), ()
        if self.config.scope == "full":
            return self._full_summaries(batch, event_x), (), ()
        order = SegmentOrder.of(batch.num_segments)
        segments = self.summarizer.segments_of(batch.events, event_x, batch.segment)
        after, last = self.summarizer.fold(segments, order, memory)
        row = batch.borders.row
        at_border = _map(lambda before, later: torch.cat([before, later])[row], memory, after)
        return self.summarizer.read_memory(at_border, batch.borders.progress), at_border, last

    def _readout(self, memory: Memory) -> Tensor | None:
        """What candidates ask of M memories, (M, H, E, columns); None where they ask nothing."""
        return self.summarizer.readout(memory) if self.config.has_candidate_memory and self.summarizer else None

    def _full_summaries(self, batch: TimelineBatch, event_x: Tensor) -> Tensor:
        """The reference: each border reads its whole history, which the batch's events then begin with."""
        assert self.summarizer is not None
        tokens = []
        for m, (lane, count) in enumerate(
            zip(batch.borders.lane.tolist(), batch.borders.progress.num_events.tolist(), strict=True)
        ):
            start = int(batch.events.offsets[lane])
            one = Progress(*(t[m : m + 1] for t in _columns(batch.borders.progress)))
            tokens.append(self.summarizer.read_full(event_x[start : start + count], one))
        return torch.stack(tokens) if tokens else event_x.new_zeros(0, self.config.num_seeds, self.config.width)

    def init_memory(self, num_lanes: int) -> Memory:
        """The memory of lanes that start at the beginning of a history."""
        return self.summarizer.init_state(num_lanes).memory if self.summarizer is not None else ()

    def rank(self, prepared: Prepared, requests: Requests, seen: list[Tensor] | None = None) -> Tensor:
        """Logits (Q, C, T). seen: takes the attention weights of each block of the ranker."""
        if self.sketch is not None:
            facts = self.sketch.read(prepared.sketch, requests, self.embedding.items.features)
            counts = facts if requests.counts is None else torch.cat([requests.counts, facts], -1)
            requests = replace(requests, counts=counts)
        return self.ranker(prepared.cache, requests, self.embedding.items(requests.candidate), seen)

    def embed(self, events: Events) -> Tensor:
        """Event vectors (N, D)."""
        return self.embedding(events.item, events.action, events.timestamp_us, events.gap_us)

    # -- serving: from stored tokens and recent events

    def rank_users(
        self,
        tokens: Tensor,
        recent: Recent,
        num_known: Tensor,
        timestamp_us: Tensor,
        candidate: Tensor,
        context: Tensor | None = None,
        sketch: Running = (),
        counts: Tensor | None = None,
        readout: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, C, T) of B users' candidates, as online ranking computes them.

        tokens (B, K, D), recent (B, R), num_known (B,) events known, timestamp_us (B,) of the request, candidate (B,
        C) item index, context (B, C, X) as prepared data has it, NaN where not given, or None, sketch (B, ...) where
        the model has one, counts (B, C, F) popularity of the candidates where the model reads it, readout
        (B, H, E, columns) where candidates ask a memory. """  # fmt: skip
        user = torch.arange(candidate.shape[0], device=candidate.device)
        prepared = self.prepare_users(tokens, recent, sketch, readout)
        if context is None:
            num_columns = self.ranker.head.context.num_columns
            context = tokens.new_full((*candidate.shape, num_columns), torch.nan)
        requests = self.requests_of(recent, num_known, timestamp_us, user, candidate, context, counts)
        return self.rank(prepared, requests)

    def prepare_users(
        self, tokens: Tensor, recent: Recent, sketch: Running = (), readout: Tensor | None = None
    ) -> Prepared:
        """What ranking needs of B users and no candidate changes; arguments as of ``rank_users``.

        Raises ValueError where the model has a sketch and none is given.
        """
        if self.sketch is not None and not sketch:
            raise ValueError("this model has a sketch: give that of the users' states, as state_sketch has it")
        event_x = self.embedding(*(c.flatten() for c in _columns(recent)))
        return Prepared(tokens, self.ranker.prepare(tokens, event_x, readout), sketch)

    @staticmethod
    def requests_of(
        recent: Recent,
        num_known: Tensor,
        timestamp_us: Tensor,
        user: Tensor,
        candidate: Tensor,
        context: Tensor,
        counts: Tensor | None = None,
    ) -> Requests:
        """Q rows of candidates, each of the user in ``user`` (Q,), who may have several, as requests.

        recent (B, R), num_known (B,) and timestamp_us (B,) are by user; candidate (Q, C), context (Q, C, X) and counts
        (Q, C, F) by row.
        """
        num_users, size = recent.item.shape
        rows = torch.arange(num_users * size, device=recent.item.device).view(num_users, size)
        return Requests(
            summary=user,
            recent=torch.where(recent.item > 0, rows, -1)[user],
            recent_item=recent.item[user],
            recent_us=recent.timestamp_us[user],
            timestamp_us=timestamp_us[user],
            num_known=num_known[user],
            candidate=candidate,
            context=context,
            counts=counts,
        )

    def init_state(self, num_users: int) -> UserState:
        """The state of users without events; without a summarizer, recent events are all of it."""
        if self.summarizer is not None:
            return self.summarizer.init_state(num_users)
        device = self.embedding.items.embedding_row.device
        recent = Recent.empty(num_users, self.config.recent_events, device)
        return UserState(Progress.start(num_users, device), recent, ())

    def extend(self, state: UserState, events: Events, alone: bool = False) -> UserState:
        """The state after these events; see ``Summarizer.extend``."""
        if self.summarizer is not None:
            return self.summarizer.extend(state, events, alone)
        events = Events.from_log(
            events.item, events.action, events.timestamp_us, events.offsets, state.progress.last_us
        )
        return UserState(state.progress.advance(events), state.recent.push(events), ())

    def init_sketch(self, num_users: int) -> Running:
        """The sketches (B, ...) of users without events; nothing where the model has none."""
        return self.sketch.initial(num_users) if self.sketch is not None else ()

    def state_sketch(self, state: UserState) -> Running:
        """The sketches (B, ...) of a state; nothing where the model has none."""
        return state.memory[-1][0] if self.sketch is not None else ()

    def state_readout(self, state: UserState) -> Tensor | None:
        """What candidates ask, (B, H, E, columns), as of the newest closed border; None where they ask nothing."""
        return self._readout(state.memory)

    def empty_summary(self, num_users: int) -> Tensor:
        """Summary tokens (B, K, D) of users without any event: the answer for those a store does not know."""
        return self.state_tokens(self.init_state(1)).expand(num_users, -1, -1)

    def state_tokens(self, state: UserState) -> Tensor:
        """The tokens training, bulk and online use: as of the newest closed border; recent events add the rest."""
        if self.summarizer is None:
            return torch.zeros(state.num_users, 0, self.config.width, device=state.recent.item.device)
        return self.summarizer.read(state, include_open=False)


def _columns(group: Progress | Recent) -> list[Tensor]:
    return [getattr(group, name) for name in group.__dataclass_fields__]


def _map(function, *memories: Memory) -> Memory:  # type: ignore[no-untyped-def]
    """Apply to every tensor of memories of one structure."""
    return tuple(
        tuple(
            tuple(function(*tensors) for tensors in zip(*running, strict=True)) for running in zip(*layers, strict=True)
        )
        for layers in zip(*memories, strict=True)
    )


def make_model(
    config: ModelConfig,
    tables: ItemTables,
    num_actions: int,
    num_tasks: int,
    context: tuple[ContextColumn, ...],
    num_counts: int,
) -> Model:
    """The model a config names."""
    match config.kind:
        case "vista" | "recent":
            return SequenceModel(config, tables, num_actions, num_tasks, context, num_counts)
        case "counts":
            return CountsModel(config, num_tasks, context, num_counts)
        case "mean":
            family: type[Baseline] = MeanPooling
        case "din":
            family = DIN
        case "sim":
            family = SIM
        case "twin":
            family = TWIN
        case "sasrec":
            family = SASRec
        case "hstu":
            family = HSTU
        case _:
            raise AssertionError(config.model)
    return family(config, tables, num_actions, num_tasks, context, num_counts)
