"""Synthetic worlds whose best possible score is known in closed form (docs/worlds.md)."""

from __future__ import annotations

from vista.data.worlds.base import World
from vista.data.worlds.details import read_detail
from vista.data.worlds.write import WORLDS, WorldOptions, make_world, write_world

__all__ = ["WORLDS", "World", "WorldOptions", "make_world", "read_detail", "write_world"]
