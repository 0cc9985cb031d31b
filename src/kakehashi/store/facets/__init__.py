"""Facets over the whole catalogue while typing: columns of dictionary codes beside the record."""

from kakehashi.store.facets.answers import Facets, Histogram, Page, Pivot
from kakehashi.store.facets.index import Index
from kakehashi.store.facets.scan import Cancel, CancelledError
from kakehashi.store.facets.search import FACETS

__all__ = [
    "FACETS",
    "Cancel",
    "CancelledError",
    "Facets",
    "Histogram",
    "Index",
    "Page",
    "Pivot",
]
