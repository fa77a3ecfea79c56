"""Event logs to prepared data, and exported summaries as features."""

from vista.data.features import SummaryFeatures

__all__ = ["SummaryFeatures"]
