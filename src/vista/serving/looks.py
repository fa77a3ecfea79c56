"""Answers as JSON for those who look closer: why a ranking, which history, which events wrote a token, which server."""

from __future__ import annotations

import time
from importlib.metadata import version as version_of
from typing import Any

import numpy as np

from vista.catalogue import Catalogue
from vista.serving.answers import about_user, plain
from vista.serving.deployment import Model
from vista.serving.explain import Counted, Explanation
from vista.serving.history import Timeline, Traced
from vista.serving.requests import RankAsk, iso
from vista.serving.service import Service
from vista.store.contract import shown as shown_url
from vista.store.record import Stored
from vista.store.versions import VersionInfo

NUM_BINS = 48  # stretches of a history whose shares are told together
NUM_STRETCHES = 96  # of time, in which events are counted
DIGITS = 6  # of a weight: more than anybody sees, and half the bytes


def explained(found: Explanation, ask: RankAsk) -> dict[str, Any]:
    """Candidates best first by the first task, each with where the ranker looked."""
    run, summaries = found.model.run, found.summaries
    tasks = run.schema.tasks
    held = np.flatnonzero(summaries.recent.item[0].numpy())[::-1]
    recent = (getattr(summaries.recent, name)[0].numpy()[held] for name in ("item", "action", "timestamp_us"))
    index = run.catalogue.encode(ask.candidates)
    known = bool(summaries.is_known[0]), int(summaries.num_events[0]), int(summaries.as_of_us[0])
    return {
        "user": ask.user,
        **about_user(found.model.version, *known),
        "at": iso(ask.at_us),
        "is_degraded": found.is_degraded,
        "tasks": list(tasks),
        "num_tokens": found.on_tokens.shape[1],
        "recent_events": _events(found.model, *recent),
        "candidates": [
            {
                "item": ask.candidates[place],
                "is_known": bool(found.is_known_item[place]),
                "features": _features(run.catalogue, int(index[place])),
                "scores": _scores(tasks, found.probability[place]),
                "attention": {
                    "tokens": _weights(found.on_tokens[place]),
                    "recent_events": _weights(found.on_recent[place][held]),
                    "itself": round(float(found.on_itself[place]), DIGITS),
                },
                "scores_without": {name: _scores(tasks, other[place]) for name, other in found.without.items()},
                "counted": [_counted(one, place) for one in found.counted],
                "meetings_after": found.meetings_after[place][held].tolist(),
            }
            for place in np.argsort(-found.probability[:, 0], kind="stable").tolist()
        ],
    }


def _scores(tasks: tuple[str, ...], probability: np.ndarray) -> dict[str, float]:
    return dict(zip(tasks, probability.tolist(), strict=True))


def _weights(values: np.ndarray) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


def _counted(counted: Counted, place: int) -> dict[str, Any]:
    events = int(counted.events[place])
    since = (counted.events_since[place], counted.seconds_since[place])
    events_since, seconds_since = (int(value) for value in since) if events else (None, None)
    return {
        "feature": counted.feature, "events": events, "events_since": events_since, "seconds_since": seconds_since,
    }  # fmt: skip


def _features(catalogue: Catalogue, index: int) -> dict[str, Any]:
    """The item's features that are known, by name."""
    codes = catalogue.features[index].tolist()
    pairs = zip(catalogue.feature_names, catalogue.feature_values, codes, strict=True)
    return {name: plain(values[code - 1]) for name, values, code in pairs if code}


def _events(model: Model, item: np.ndarray, action: np.ndarray, at_us: np.ndarray) -> list[dict[str, Any]]:
    catalogue, actions = model.run.catalogue, [None, *model.run.schema.actions]
    return [
        {
            "item": plain(one),
            "is_known": one is not None,
            "features": _features(catalogue, index),
            "action": plain(actions[code]),
            "at": iso(moment),
        }
        for one, index, code, moment in zip(
            catalogue.decode(item), item.tolist(), action.tolist(), at_us.tolist(), strict=True
        )
    ]


def _placed(model: Model, known: Timeline, rows: np.ndarray) -> list[dict[str, Any]]:
    """Some events of a timeline, each with its place."""
    events = _events(model, known.item[rows], known.action[rows], known.timestamp_us[rows])
    return [{"place": place, **one} for place, one in zip(known.place[rows].tolist(), events, strict=True)]


def history(model: Model, known: Timeline, user: Any, limit: int, before: int) -> dict[str, Any]:
    """Events before a place, newest first."""
    end = int(np.searchsorted(known.place, before))
    rows = np.arange(max(end - limit, 0), end)[::-1]
    return {
        "user": user,
        "model_version": model.version,
        "num_events": known.num_events,
        "num_missing": known.num_missing,
        "note": known.note,
        "first_at": iso(int(known.timestamp_us[0])) if len(known.place) else None,
        "last_at": iso(int(known.timestamp_us[-1])) if len(known.place) else None,
        "by_time": _by_time(known.timestamp_us),
        "next_before": int(known.place[rows[-1]]) if len(rows) and rows[-1] else None,
        "events": _placed(model, known, rows),
    }


def _by_time(timestamp_us: np.ndarray) -> list[int]:
    """How many of the known events fall into each of NUM_STRETCHES equal stretches between the first and the last."""
    if not len(timestamp_us):
        return []
    since_us = timestamp_us - timestamp_us[0]
    counts: list[int] = np.bincount(since_us * NUM_STRETCHES // (since_us[-1] + 1), minlength=NUM_STRETCHES).tolist()
    return counts


def tokens(found: Traced, user: Any, num_events: int) -> dict[str, Any]:
    """Per token how much of it can be traced, to which stretches of the history, and the events with most of it."""
    known = found.timeline
    row_of_place = np.searchsorted(known.place, found.place)
    bins = found.place * NUM_BINS // max(found.num_closed, 1)
    return {
        "user": user,
        "model_version": found.model.version,
        "num_events": known.num_events,
        "num_summarized": found.num_closed,
        "num_traced": len(found.place),
        "note": known.note,
        "why_not": found.why_not,
        "num_bins": NUM_BINS,
        "tokens": [_token(found, share, bins, row_of_place, num_events) for share in found.shares if not found.why_not],
    }


def _token(found: Traced, share: np.ndarray, bins: np.ndarray, rows: np.ndarray, num_events: int) -> dict[str, Any]:
    number = min(num_events, len(share))
    best = np.argpartition(-share, number - 1)[:number] if number else np.zeros(0, np.int64)
    best = best[np.argsort(-share[best], kind="stable")]
    events = _placed(found.model, found.timeline, rows[best])
    return {
        "traced": round(min(float(share.sum(dtype=np.float64)), 1.0), DIGITS),
        "by_bin": _weights(np.bincount(bins, share, NUM_BINS)),
        "events": [one | {"share": weight} for one, weight in zip(events, _weights(share[best]), strict=True)],
    }


def some_users(model: Model, stored: list[Stored]) -> dict[str, Any]:
    """Users by the keys of their records; one whose key is a hash has no name here."""
    return {
        "model_version": model.version,
        "users": [
            {"user": name, "num_events": one.num_events, "as_of": iso(one.as_of_us)}
            for one in stored
            if (name := _user_of(one.user_key)) is not None
        ],
    }


def _user_of(key: bytes) -> Any:
    kind, _, text = key.partition(b":")
    if kind == b"i":
        return int(text)
    return text.decode("utf-8", "replace") if kind == b"s" else None


def status(service: Service, versions: list[VersionInfo], published: str | None) -> dict[str, Any]:
    """What an operator asks first: which model, which store, since when, and is it well."""
    model, config = service.model, service.model.run.config.model
    return {
        "server_version": version_of("vista-recsys"),
        "uptime_s": round(time.monotonic() - service.began_s, 1),
        "problem": service.why_not_ready(),
        "model": {
            "version": model.version,
            "tasks": list(model.run.schema.tasks),
            "memory": config.memory,
            "num_tokens": model.scorer.model.empty_summary(1).shape[1],
            "width": config.width,
            "segment_events": config.segment_events,
            "recent_events": config.recent_events,
            "sketch_slots": config.sketch_slots if model.scorer.model.sketch is not None else 0,
            "num_items": model.run.catalogue.num_items,
        },
        "store": {
            "url": shown_url(service.options.store),
            "is_up": service.deployment.is_store_up,
            "published": published,
            "versions": [
                {"version": one.version, "num_users": one.num_users, "expected_users": one.expected_users,
                 "is_complete": one.is_complete, "created": iso(one.created_us)}
                for one in versions
            ],
        },
    }  # fmt: skip
