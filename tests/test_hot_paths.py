"""No hot path becomes a fifth dearer unnoticed: operators, flops and bytes are counted, not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.hot_paths import BASELINE, all_paths, count, losses, model_of
from tests.models.worlds import histories
from vista.models.folding import LayerFold

REMEDY = """Hot paths cost over a fifth more than in tests/hot_paths.json:

  {}

If it is meant to be so, count anew with `python -m tests.hot_paths`, look at the difference, commit it, and say in the
message what the cost buys; else look for what is now made twice, copied, or made for nobody."""


def test_no_hot_path_costs_a_fifth_more(tmp_path: Path) -> None:
    lost = losses(all_paths(tmp_path), json.loads(BASELINE.read_text()))
    assert not lost, REMEDY.format("\n  ".join(lost))


def test_a_needless_copy_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = json.loads(BASELINE.read_text())
    as_it_is = LayerFold._heads
    monkeypatch.setattr(LayerFold, "_heads", lambda self, x: as_it_is(self, x).contiguous())
    model, events = model_of("slots"), histories([4_096, 1_000, 1_000])
    path = "bulk fold, slots"
    with torch.no_grad():
        found = {path: count(lambda: model.extend(model.init_state(3), events))}
    assert "copied" in " ".join(losses(found, {path: baseline[path]}))
