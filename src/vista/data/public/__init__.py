"""Public event logs, downloaded where there is a network and converted from a local copy otherwise.

Each converter writes a folder that ``vista prepare`` reads:

    OUT/events.parquet     user_id, item_id, timestamp (epoch s or ms), action; macports: burst, one per commit
    OUT/items.parquet      item_id, category, ...
    OUT/dataset.json       name, source, options and sizes
"""

from __future__ import annotations

from vista.data.public.macports import MacportsOptions, convert_macports
from vista.data.public.movielens import MovielensOptions, convert_movielens

__all__ = ["MacportsOptions", "MovielensOptions", "convert_macports", "convert_movielens"]
