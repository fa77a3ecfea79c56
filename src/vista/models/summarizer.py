"""Stage 1: a whole history in, K summary tokens out.

Where this leaves the paper (arXiv 2510.22049, section 3): its operator is bidirectional over the whole history, so
that one new event changes every row. Here a history is folded in segments of S events; an event sees all earlier
segments and its own, never a later one, and never a seed. Hence:

- a closed segment never changes again; a new event costs the open segment, S rows, not the history;
- `forward` is `read(extend(init_state(), events))`: bulk, training and stream run the same steps in the same order;
- memory is constant: a history of any length streams through all layers block by block.

``scope="full"`` is the paper's operator (S = infinity), exactly, up to the norm of the memory: kept as the reference,
at the paper's price: its state is the whole history, and each read is a pass over it.

Shape letters: B users, N events, S events in a segment, G segments, K summary tokens, R recent events, D width, H
heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vista.config import ModelConfig
from vista.errors import ConfigError
from vista.models.batch import LayerMemory, flatten, unflatten
from vista.models.embeddings import EventEmbedding
from vista.models.folding import can_fold, fold_closed
from vista.models.inputs import US_PER_S, Events, Progress, Recent, ragged_index
from vista.models.layers import GatedUnit, aligned, join_heads, norm, project_normed, split_heads
from vista.models.memory import (
    ASKABLE,
    AskableMemory,
    Memory,
    Running,
    SlotsMemory,
    SumMemory,
    make_memory,
    project_heads,
)
from vista.models.recomputed import fold_in_blocks, must_recompute, read_in_blocks
from vista.models.sketch import Sketch
from vista.ops.order import SegmentOrder
from vista.ops.qla import carried, qla, read_memory, rms_norm

BLOCK_SEGMENTS = 4  # of one user folded at a time on a CPU where tiles do not (with gradients, other memories)
GPU_BLOCK_EVENTS = 262_144  # folded at a time on a GPU, of all users together: enough to fill it, some 100 MB a tensor
SKETCH_BLOCK_EVENTS = 16_384  # that a sketch takes in at a time, of all users together: what all segments share
SEED_SCALE = 0.1  # of fresh seed vectors: small beside what they read


@dataclass(frozen=True)
class UserState:
    """All that is carried from one call to the next, for B users.

    progress  how many events, from when to when
    recent    the newest R raw events (R >= S); the open segment is the newest num_events % S of them
    memory    per layer, per memory of the layer, its running value over the closed segments; then the sketch's, if any
    """

    progress: Progress
    recent: Recent
    memory: tuple[LayerMemory, ...]

    @property
    def num_users(self) -> int:
        return len(self.progress.num_events)

    def to(self, device: torch.device | str) -> UserState:
        memory = unflatten([t.to(device) for t in flatten(self.memory)], self.memory)
        return UserState(self.progress.to(device), self.recent.to(device), memory)


@dataclass(frozen=True)
class Segments:
    """G segments of S events: vectors x (G, S, D), is_valid (G, S), item and timestamp_us (G, S) int64."""

    x: Tensor
    is_valid: Tensor
    item: Tensor
    timestamp_us: Tensor

    def rows(self, chosen: Tensor) -> Segments:
        """Some of the segments."""
        return Segments(*(getattr(self, f.name)[chosen] for f in fields(self)))


class SummarizerLayer(nn.Module):
    """x + mixer(norm x), then x + SGLU(norm x), for events and for seeds, with the same weights (paper: one source)."""

    def __init__(self, config: ModelConfig, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.config = config
        full = config.scope == "full"
        # After the last layer nobody reads the events any more: seeds read the layer's input.
        self.mixes_events = full or not is_last
        reader = None if full else make_memory(config)
        self.reader = reader
        self.mixer = None
        if not full and self.mixes_events and config.attention == "qla":
            self.mixer = reader if isinstance(reader, SumMemory) else SumMemory(config)
        # A ModuleList with the reader twice would double its parameters' names.
        self.memories: list[Memory] = [m for m in (reader, self.mixer) if m is not None]
        if self.mixer is reader and reader is not None:
            self.memories = [reader]
        # Candidates ask the first layer: its keys are made of the events alone, as a candidate's question is.
        self.asked: int | None = None  # its place among the memories
        self.own_asked: nn.Module | None = None
        if config.has_candidate_memory and is_first:
            self._add_asked(ASKABLE[config.candidate_memory], config)
        needs_query = self.mixes_events or not isinstance(reader, SlotsMemory)
        self.query = aligned(config.width) if needs_query else None
        self.key, self.value, self.out = (aligned(config.width) for _ in range(3))
        has_mass = reader is not None and reader.has_mass
        self.mass = nn.Linear(config.num_heads, config.width, bias=False) if has_mass else None
        self.unit = GatedUnit(config.width, config.expansion)

    def _add_asked(self, kind: type[nn.Module], config: ModelConfig) -> None:
        """Have a memory of this kind for candidates: one that is there anyway, or one of their own."""
        is_kind = [isinstance(memory, kind) for memory in self.memories]
        if not any(is_kind):
            self.own_asked = kind(config)
            self.memories.append(cast(Memory, self.own_asked))
            is_kind.append(True)
        self.asked = is_kind.index(True)

    def initial(self, num_users: int) -> LayerMemory:
        return tuple(memory.initial(num_users) for memory in self.memories)

    def fold(
        self, x: Tensor, is_valid: Tensor, order: SegmentOrder, memory: LayerMemory
    ) -> tuple[Tensor | None, LayerMemory, LayerMemory]:
        """One pass over segments x (G, S, D), is_valid (G, S), on top of ``memory``.

        Returns the events' next rows (None after the last layer), the memory after each segment (G, ...), and after
        all (B, ...).
        """
        k, v, q = self._heads(x)
        folded = [
            m.scan(order, running, m.parts(k, v, is_valid)) for m, running in zip(self.memories, memory, strict=True)
        ]
        after, last = tuple(f[0] for f in folded), tuple(f[1] for f in folded)
        if not self.mixes_events:
            return None, after, last
        assert q is not None
        if self.mixer is not None:
            o = read_memory(q, after[self.memories.index(self.mixer)][0], rms_norm)
        else:
            o = scaled_dot_product_attention(q, k, v, attn_mask=is_valid[:, None, None, :])
        return self._add(x, join_heads(o)), after, last

    def read(self, s: Tensor, memory: LayerMemory, num_events: Tensor) -> Tensor:
        """Seeds s (M, K, D) read M users' memories, num_events (M,): their next rows."""
        k, v, q = self._heads(s)
        assert self.reader is not None
        o, mass = self.reader.read(memory[0], k if q is None else q, k, v, num_events)
        read = join_heads(o)
        if mass is not None and self.mass is not None:
            return self._add(s + self.mass(mass.to(s.dtype)), read)
        return self._add(s, read)

    def shares(self, x: Tensor, memory: LayerMemory) -> Tensor | None:
        """What share of each slot of one user the events x (G, S, D) of this layer have, (G, H, K, S).

        None where the memory is no weighted mean of events.
        """
        if not isinstance(self.reader, SlotsMemory):
            return None
        return self.reader.shares(self._project(self.key, norm(x)), memory[0])

    def readout(self, memory: LayerMemory) -> Tensor | None:
        """What candidates ask, (B, H, E, columns), as `carried`; None where they ask nothing."""
        if self.asked is None:
            return None
        asked = cast(AskableMemory, self.memories[self.asked])
        return asked.readout(memory[self.asked]).to(carried(self.key.weight).dtype)

    def full(self, rows: Tensor) -> Tensor:
        """The paper's layer: events and seeds of one user as one source, (rows, D)."""
        h = norm(rows)
        assert self.query is not None
        q, k, v = (self._project(p, h) for p in (self.query, self.key, self.value))
        if self.config.attention == "qla":
            nobody = q[:, :0]
            o, _ = qla(q, k, v, nobody, nobody, nobody, norm=rms_norm)
        else:
            o = scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self._add(rows, join_heads(o))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and, where the layer has any, queries of rows x (..., rows, D), (..., H, rows, E) each."""
        linears = [self.key, self.value] + ([self.query] if self.query is not None else [])
        k, v, *q = (split_heads(t, self.config.num_heads) for t in project_normed(x, *linears))
        return k, v, q[0] if q else None

    def _project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return project_heads(linear, x, self.config.num_heads)

    def _add(self, x: Tensor, read: Tensor) -> Tensor:
        return self.unit.added(x + self.out(read))


class Summarizer(nn.Module):
    """History to summary tokens, all at once or as the user acts."""

    def __init__(self, config: ModelConfig, embedding: EventEmbedding) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.seeds = nn.Parameter(SEED_SCALE * torch.randn(config.num_seeds, config.width))
        self.size = nn.Linear(2, config.width)
        nn.init.normal_(self.size.weight, std=SEED_SCALE)
        nn.init.zeros_(self.size.bias)
        items = embedding.items
        self.sketch = None
        if config.has_sketch:
            num_items = len(items.embedding_row)
            self.sketch = Sketch(
                config.sketch_slots, num_items, items.feature_sizes, config.sketch_traces, config.segment_events,
                config.sketch_predecessors,
            )  # fmt: skip
        last = config.num_layers - 1
        self.layers = nn.ModuleList(SummarizerLayer(config, i == 0, i == last) for i in range(config.num_layers))

    # -- the whole history at once

    def forward(self, events: Events) -> Tensor:
        """Summary tokens (B, K, D) of B users' whole histories."""
        return self.read(self.extend(self.init_state(events.num_users), events))

    # -- as the user acts

    def init_state(self, num_users: int) -> UserState:
        """The state of users without events."""
        device, dtype = self.seeds.device, carried(self.seeds).dtype
        initial = [layer.initial(num_users) for layer in self._layers]
        if self.sketch is not None:
            initial.append((self.sketch.initial(num_users),))
        memory = tuple(
            tuple(
                tuple(t.to(device, dtype if t.dtype == torch.float32 else t.dtype) for t in running)
                for running in layer_memory
            )
            for layer_memory in initial
        )
        size = 0 if self.config.scope == "full" else self.config.recent_events
        return UserState(Progress.start(num_users, device), Recent.empty(num_users, size, device), memory)

    def extend(self, state: UserState, events: Events, alone: bool = False) -> UserState:
        """The state after these events, which happen after all that the state knows; the gap to them is taken from it.

        alone: fold every segment by itself. A matrix product of another height may round its rows differently; so the
        result is bit for bit the same however the events are cut into calls and whoever else is in them, and slower.

        Raises ConfigError with scope "full", whose state is the history itself, for more than one user at a time.
        """
        events = Events.from_log(
            events.item, events.action, events.timestamp_us, events.offsets, state.progress.last_us
        )
        if self.config.scope == "full":
            return self._remember_everything(state, events)
        pending = join(state.recent.newest(self.num_open(state)), events)
        # in main memory: what steers the loop waits for a GPU once, not at each block
        closed = (pending.lengths() // self.config.segment_events).cpu()
        if alone:
            memory = self._fold_alone(state.memory, pending, closed)
        elif can_fold(self._layers, self.seeds):
            memory = fold_closed(self._layers, self.embedding, state.memory[: len(self.layers)], pending, closed)
            if self.sketch is not None:
                memory = (*memory, (self._fold_sketch(state.memory[-1][0], pending, closed),))
        else:
            memory = state.memory
            block_events = GPU_BLOCK_EVENTS if pending.item.device.type != "cpu" else 0
            for start, at_once in self._blocks(closed, block_events):
                memory = self._fold_block(memory, pending, start, at_once)
        return UserState(state.progress.advance(events), state.recent.push(events), memory)

    def read(self, state: UserState, include_open: bool = True) -> Tensor:
        """Summary tokens (B, K, D). Without the open segment they are as of the newest closed border."""
        if self.config.scope == "full":
            return self._read_full(state, include_open)
        if not include_open:
            return self.read_memory(state.memory, self.border(state))
        num_open = self.num_open(state)
        pending = state.recent.newest(num_open)
        memory = (
            self._fold_block(state.memory, pending, 0, (num_open > 0).long()) if int(num_open.sum()) else state.memory
        )
        return self.read_memory(memory, state.progress)

    def num_open(self, state: UserState) -> Tensor:
        """Events in the open segment of each user, (B,)."""
        return state.progress.num_events % self.config.segment_events

    def border(self, state: UserState) -> Progress:
        """The progress as of the newest closed segment's border."""
        num_open = self.num_open(state)
        closed = state.progress.num_events - num_open
        if not state.recent.item.shape[1]:  # scope "full" before the first event
            return state.progress
        place = (state.recent.item.shape[1] - 1 - num_open).clamp(min=0)
        last = state.recent.timestamp_us.gather(1, place[:, None]).squeeze(1)
        nothing = closed == 0
        return Progress(closed, state.progress.first_us.masked_fill(nothing, -1), last.masked_fill(nothing, -1))

    # -- the steps both are made of; training calls them directly

    def fold(
        self, segments: Segments, order: SegmentOrder, memory: tuple[LayerMemory, ...]
    ) -> tuple[tuple[LayerMemory, ...], tuple[LayerMemory, ...]]:
        """Segments through all layers on top of ``memory`` (B, ...).

        Returns the memory after each segment (G, ...) and after all (B, ...).
        """
        if must_recompute(segments.is_valid.numel()):
            return fold_in_blocks(self._fold, segments, order, memory)
        return self._fold(segments, order, memory)

    def _fold(
        self, segments: Segments, order: SegmentOrder, memory: tuple[LayerMemory, ...]
    ) -> tuple[tuple[LayerMemory, ...], tuple[LayerMemory, ...]]:
        after, last = [], []
        rows: Tensor | None = segments.x
        for layer, before in zip(self._layers, memory, strict=False):  # behind the layers' memories stands the sketch
            assert rows is not None
            rows, layer_after, layer_last = layer.fold(rows, segments.is_valid, order, before)
            after.append(layer_after)
            last.append(layer_last)
        if self.sketch is not None:
            columns = (segments.item, segments.timestamp_us, segments.is_valid)
            sketch_after, sketch_last = self._scan_sketch(*columns, order, memory[-1][0])
            after.append((sketch_after,))
            last.append((sketch_last,))
        return tuple(after), tuple(last)

    def segments_of(self, events: Events, x: Tensor | None, index: Tensor) -> Segments:
        """Rows ``index`` (G, S) of events, -1 pads. x (N, D): their vectors, where they are there already."""
        flat = index.clamp(min=0)
        item, timestamp_us = events.item[flat], events.timestamp_us[flat]
        columns = (item, events.action[flat], timestamp_us, events.gap_us[flat])
        return Segments(self.embedding(*columns) if x is None else x[flat], index >= 0, item, timestamp_us)

    def read_memory(self, memory: tuple[LayerMemory, ...], progress: Progress) -> Tensor:
        """Summary tokens (M, K, D) from M memories, each as of its progress."""
        if must_recompute(len(progress.num_events) * self.config.num_seeds):
            return read_in_blocks(self._read_memory, memory, progress, self.config.num_seeds)
        return self._read_memory(memory, progress)

    def _read_memory(self, memory: tuple[LayerMemory, ...], progress: Progress) -> Tensor:
        s = self._fresh_seeds(progress)
        for layer, layer_memory in zip(self._layers, memory, strict=False):
            s = layer.read(s, layer_memory, progress.num_events)
        return norm(s)

    def readout(self, memory: tuple[LayerMemory, ...]) -> Tensor | None:
        """What candidates ask of M memories, (M, H, E, columns); None where they ask nothing."""
        return self._layers[0].readout(memory[0])

    @property
    def _layers(self) -> list[SummarizerLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _fresh_seeds(self, progress: Progress) -> Tensor:
        dtype = carried(self.seeds).dtype
        span_s = (progress.last_us - progress.first_us).to(dtype) / US_PER_S
        size = torch.stack([progress.num_events.to(dtype).log1p(), span_s.log1p()], -1) / 10  # about 1 at most
        return self.seeds + self.size(size)[:, None, :]

    def _fold_block(
        self, memory: tuple[LayerMemory, ...], pending: Events, first_segment: int, num_segments: Tensor
    ) -> tuple[LayerMemory, ...]:
        """Fold segments first_segment .. of each user's pending events; num_segments (B,)."""
        order, index = self._segment_rows(pending, first_segment, num_segments)
        return self.fold(self.segments_of(pending, None, index), order, memory)[1]

    def _segment_rows(self, pending: Events, first_segment: int, num_segments: Tensor) -> tuple[SegmentOrder, Tensor]:
        """The order of those segments, and the rows of their events, (G, S), -1 pads."""
        size = self.config.segment_events
        order = SegmentOrder.of(num_segments)
        user = order.user.to(pending.offsets.device)
        starts = pending.offsets[user] + (first_segment + order.ordinal.to(user.device)) * size
        return order, ragged_index(starts, (pending.offsets[user + 1] - starts).clamp(max=size), size)

    def _blocks(self, closed: Tensor, block_events: int) -> Iterator[tuple[int, Tensor]]:
        """Segments of each user that are folded at a time, in time order: the first one, and how many (B,).

        block_events: of all users together, but for BLOCK_SEGMENTS of each.
        """
        at_once = max(BLOCK_SEGMENTS, block_events // (self.config.segment_events * max(len(closed), 1)))
        for start in range(0, int(closed.max()) if len(closed) else 0, at_once):
            yield start, (closed - start).clamp(0, at_once)

    def _fold_sketch(self, running: Running, pending: Events, closed: Tensor) -> Running:
        """The sketches (B, ...) after closed[b] segments of each user's pending events."""
        for start, num_segments in self._blocks(closed, SKETCH_BLOCK_EVENTS):
            order, index = self._segment_rows(pending, start, num_segments)
            flat = index.clamp(min=0)
            columns = (pending.item[flat], pending.timestamp_us[flat], index >= 0)
            running = self._scan_sketch(*columns, order, running, keep=False)[1]
        return running

    def _scan_sketch(
        self,
        item: Tensor,
        timestamp_us: Tensor,
        is_valid: Tensor,
        order: SegmentOrder,
        running: Running,
        keep: bool = True,
    ) -> tuple[Running, Running]:
        """Segments (G, S) into sketches (B, ...): after each segment, if ``keep``, and after all."""
        assert self.sketch is not None
        parts = self.sketch.parts(item, self.embedding.items.features[item], timestamp_us, is_valid)
        return self.sketch.fold(parts, order, running, keep)

    def _fold_alone(self, memory: tuple[LayerMemory, ...], pending: Events, closed: Tensor) -> tuple[LayerMemory, ...]:
        """Fold closed[b] segments of each user, every one in a call of its own."""
        tensors = [t.clone() for t in flatten(memory)]
        for user in torch.nonzero(closed).flatten().tolist():
            mine = slice(int(pending.offsets[user]), int(pending.offsets[user + 1]))
            columns = {f.name: getattr(pending, f.name)[mine] for f in fields(Events) if f.name != "offsets"}
            own = Events(**columns, offsets=torch.tensor([0, mine.stop - mine.start]))
            running = unflatten([t[user : user + 1].clone() for t in tensors], memory)
            for segment in range(int(closed[user])):
                running = self._fold_block(running, own, segment, torch.ones(1, dtype=torch.int64))
            for tensor, row in zip(tensors, flatten(running), strict=True):
                tensor[user] = row[0]
        return unflatten(tensors, memory)

    # -- scope "full": the reference

    def _remember_everything(self, state: UserState, events: Events) -> UserState:
        if state.num_users != 1:
            raise ConfigError(
                f"scope 'full' keeps the whole history as its state, for one user at a time, not {state.num_users}; "
                "use scope 'segment'"
            )
        columns = zip(
            (state.recent.item, state.recent.action, state.recent.timestamp_us, state.recent.gap_us),
            (events.item, events.action, events.timestamp_us, events.gap_us),
            strict=True,
        )
        recent = Recent(*(torch.cat([old, new[None]], 1) for old, new in columns))
        return UserState(state.progress.advance(events), recent, state.memory)

    def _read_full(self, state: UserState, include_open: bool) -> Tensor:
        progress = state.progress if include_open else self.border(state)
        recent, count = state.recent, int(progress.num_events)
        columns = (recent.item, recent.action, recent.timestamp_us, recent.gap_us)
        return self.read_full(self.embedding(*(c[0, :count] for c in columns)), progress)[None]

    def read_full(self, x: Tensor, progress: Progress) -> Tensor:
        """The paper's summary of one history: event vectors x (N, D), progress of one user, to (K, D)."""
        rows = torch.cat([x, self._fresh_seeds(progress)[0]])
        for layer in self._layers:
            rows = layer.full(rows)
        return norm(rows[len(x) :])


def join(a: Events, b: Events) -> Events:
    """The events of ``a`` followed by those of ``b``, user by user."""
    if not len(a.item):
        return b
    users = torch.arange(a.num_users, device=a.offsets.device)
    user = torch.cat([torch.repeat_interleave(users, a.lengths()), torch.repeat_interleave(users, b.lengths())])
    place = torch.argsort(user, stable=True)
    offsets = a.offsets + b.offsets
    columns = ("item", "action", "timestamp_us", "gap_us")
    return Events(**{c: torch.cat([getattr(a, c), getattr(b, c)])[place] for c in columns}, offsets=offsets)
