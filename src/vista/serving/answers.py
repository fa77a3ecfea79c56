"""Answers as JSON for people. ``openapi.py`` says what each field means; ``looks.py`` has those of who looks closer."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from vista.serving.deployment import Model
from vista.serving.events import Posted
from vista.serving.recommend import Recommended
from vista.serving.requests import RankAsk, RecommendAsk, iso
from vista.serving.service import Ranked
from vista.store.record import Stored
from vista.updates.apply import OUTCOMES


def ranked(found: Ranked, ask: RankAsk) -> dict[str, Any]:
    """Candidates best first by the first task."""
    ranking, tasks = found.ranking, found.model.run.schema.tasks
    order = np.argsort(-ranking.probability[:, 0], kind="stable").tolist()
    scores, is_known = ranking.probability.tolist(), ranking.is_known_item.tolist()
    return {
        "user": ask.user,
        **about_user(found.model.version, ranking.is_known_user, ranking.num_events, ranking.as_of_us),
        "at": iso(ask.at_us),
        "is_degraded": found.is_degraded,
        "tasks": list(tasks),
        "candidates": [
            {
                "item": ask.candidates[place],
                "is_known": is_known[place],
                "scores": dict(zip(tasks, scores[place], strict=True)),
            }
            for place in order
        ],
    }


def recommended(found: Recommended, ask: RecommendAsk) -> dict[str, Any]:
    """Items best first by the first task."""
    tasks = found.model.run.schema.tasks
    items = found.model.run.catalogue.decode(found.index)
    return {
        "user": ask.user,
        **about_user(found.model.version, found.is_known_user, found.num_events, found.as_of_us),
        "at": iso(ask.at_us),
        "is_degraded": found.is_degraded,
        "tasks": list(tasks),
        "num_scored": found.num_scored,
        "is_exact": found.is_exact,
        "items": [
            {"item": plain(item), "scores": dict(zip(tasks, scores, strict=True))}
            for item, scores in zip(items, found.probability.tolist(), strict=True)
        ],
    }


def about_user(version: str, is_known: bool, num_events: int, as_of_us: int) -> dict[str, Any]:
    return {"model_version": version, "is_known_user": is_known, "num_events": num_events, "as_of": iso(as_of_us)}


def posted(found: Posted) -> dict[str, Any]:
    """What became of each event, and how many of each."""
    counts = {word: found.outcomes.count(word) for word in OUTCOMES}
    return {"model_version": found.version, "outcomes": found.outcomes, "counts": counts}


def user(model: Model, stored: Stored, user_id: Any) -> dict[str, Any]:
    """A user's summary and recent events, newest first."""
    arrays = stored.arrays
    items = model.run.catalogue.decode(arrays["recent_item"])
    actions = [None, *model.run.schema.actions]
    rows = zip(items, arrays["recent_action"].tolist(), arrays["recent_timestamp_us"].tolist(), strict=True)
    recent = [
        {"item": plain(item), "is_known": item is not None, "action": plain(actions[action]), "at": iso(at_us)}
        for item, action, at_us in rows
    ]
    number, width = arrays["tokens"].shape
    age_us = time.time_ns() // 1000 - stored.as_of_us
    return {
        "user": user_id,
        "num_events": stored.num_events,
        "as_of": iso(stored.as_of_us),
        "freshness_s": max(age_us, 0) / 1e6 if stored.as_of_us >= 0 else None,
        "model_version": model.version,
        "tokens": {"number": number, "width": width, "codec": stored.codec},
        "recent_events": recent[::-1],
    }


def plain(value: Any) -> Any:
    """A value of numpy as Python's own."""
    return value.item() if hasattr(value, "item") else value
