"""What explains a world's impressions, for those of a split: to measure a part of them by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from vista.data.histories import PreparedData

US_PER_S = 1_000_000


def read_detail(world: Path, data: PreparedData, split: str, name: str) -> np.ndarray | None:
    """The column ``name`` of a world's details.parquet for each impression of a split of its prepared data, in their
    order; None where the world has no such column.
    """
    keys = ("user_id", "item_id", "timestamp")
    details = pl.scan_parquet(world / "details.parquet")
    if name not in details.collect_schema().names():
        return None
    impressions, catalogue = data.impressions(split), data.catalogue
    request = np.repeat(np.arange(impressions.num_requests), np.diff(impressions.offsets))
    shown = pl.DataFrame(
        {
            "user_id": data.user_ids[impressions.user[request]],
            "item_id": catalogue.ids[impressions.item - catalogue.first_item],
            "timestamp": impressions.timestamp_us[request] // US_PER_S,
        }
    )
    found = details.select(*keys, name).unique(keys).collect()
    types = {key: found.schema[key] for key in keys}
    joined = shown.cast(types).join(found, on=keys, how="left", maintain_order="left")  # type: ignore[arg-type]
    return joined[name].to_numpy()
