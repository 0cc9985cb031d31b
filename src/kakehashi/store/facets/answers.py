"""What the searches answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Mapping

    from kakehashi.store.query import Value


@dataclass(frozen=True, slots=True)
class Facets:
    """Counts for each value of some columns.

    Attributes
    ----------
    total : int
        Series that meet everything.
    counts : mapping of str to tuple of (value, int)
        The most frequent first; only values that are there. None is not known, or no flag.
    """

    total: int
    counts: Mapping[str, tuple[tuple[Value, int], ...]]


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows, in the order asked for.

    Attributes
    ----------
    total : int
        Series that meet everything.
    rows : tuple of dict
    """

    total: int
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by range.

    Attributes
    ----------
    edges : tuple
        One more than there are counts; each range includes its lower edge, the last both.
        Empty where no value is known.
    counts : tuple of int
    unknown : int
        Series that have no value.
    """

    edges: tuple[float | dt.date, ...]
    counts: tuple[int, ...]
    unknown: int


@dataclass(frozen=True, slots=True)
class Pivot:
    """Counts for two columns against each other.

    Attributes
    ----------
    rows, columns : tuple
        Values, sorted; None (not known) first.
    counts : tuple of tuple of int
        A tuple for each row.
    """

    rows: tuple[Value, ...]
    columns: tuple[Value, ...]
    counts: tuple[tuple[int, ...], ...]
