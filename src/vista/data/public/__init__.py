"""Public event logs, downloaded where there is a network and converted from a local copy otherwise.

Each converter writes a folder that ``vista prepare`` reads:

    OUT/events.parquet         user_id, item_id, timestamp (epoch s or ms), action; macports: burst, one per commit
    OUT/items.parquet          item_id, category, ...
    OUT/impressions.parquet    kuairand alone: user_id, item_id, timestamp, labels, tab
    OUT/dataset.json           name, source, options and sizes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vista.data.public.amazon import AmazonOptions, convert_amazon
from vista.data.public.kuairand import KuairandOptions, convert_kuairand
from vista.data.public.macports import MacportsOptions, convert_macports
from vista.data.public.movielens import MovielensOptions, convert_movielens
from vista.data.public.taobao import TaobaoOptions, convert_taobao
from vista.data.public.yambda import YambdaOptions, convert_yambda

__all__ = [
    "CONVERTERS", "AmazonOptions", "Converter", "KuairandOptions", "MacportsOptions", "MovielensOptions",
    "TaobaoOptions", "YambdaOptions", "convert_amazon", "convert_kuairand", "convert_macports", "convert_movielens",
    "convert_taobao", "convert_yambda",
]  # fmt: skip


@dataclass(frozen=True)
class Converter:
    """A converter, called with (out, source, options), the class of its options, and whether source may be None."""

    convert: Callable[..., dict[str, Any]]
    options: type
    can_download: bool = False


CONVERTERS = {
    "movielens": Converter(convert_movielens, MovielensOptions, can_download=True),
    "macports": Converter(convert_macports, MacportsOptions, can_download=True),
    "kuairand": Converter(convert_kuairand, KuairandOptions),
    "taobao": Converter(convert_taobao, TaobaoOptions),
    "amazon": Converter(convert_amazon, AmazonOptions),
    "yambda": Converter(convert_yambda, YambdaOptions),
}
