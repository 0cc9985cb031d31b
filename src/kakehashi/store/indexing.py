"""Keeps the index of facets level with the catalogue's record."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from kakehashi.store.facets import Index
from kakehashi.store.facets.index import INDEX
from kakehashi.store.layout import Layout, give_to_group, locked
from kakehashi.store.query import TRUE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kakehashi.config import StoreHost
    from kakehashi.store.catalogue import Catalogue, Series

MOST_SEGMENTS = 16
"""Small segments that are let stand; with more of them they become one."""

SMALL = 200_000
"""Rows up to which a segment counts as small."""

_BATCH = 20_000
_UID = ("series_uid",)


def opened(store: StoreHost) -> Index:
    """Open the index of a store, and make it where there is none yet."""
    folder = Layout(store.root).facets
    if (folder / INDEX).exists():
        return Index.open(folder)
    folder.mkdir(mode=0o750, exist_ok=True)
    give_to_group(folder, f"{store.account_prefix}view")
    # What is made in it gets its group: the catalogue service reads it, and does not write.
    folder.chmod(0o2750)
    return Index.create(folder)


def enter(store: StoreHost, catalogue: Catalogue, index: Index, rows: Sequence[Series]) -> None:
    """Add series that were packed just now, but those of who withdrew meanwhile."""
    if not rows:
        return
    # Who withdraws takes this lock too, and is either before us or behind us.
    with locked(Layout(store.root).packs / ".lock", wait=True):
        there = [row for row in rows if catalogue.series(row.series_uid) is not None]
        if there:
            index.add_segment([there])
    if index.segments > MOST_SEGMENTS:
        index.compact(SMALL)


def catch_up(
    store: StoreHost,
    catalogue: Catalogue,
    index: Index,
    on_row: Callable[[int, int], None] | None = None,
) -> int:
    """Add what the catalogue has and the index has not; return how many series that were.

    Parameters
    ----------
    on_row : callable, optional
        Called with (series looked at, series in all).
    """
    total = catalogue.count()
    if index.rows == total:
        return 0
    # Nobody withdraws, or packs, while it is found out what is missing.
    with locked(Layout(store.root).packs / ".lock", wait=True):
        return _add_missing(catalogue, index, total, on_row)


def _add_missing(
    catalogue: Catalogue,
    index: Index,
    total: int,
    on_row: Callable[[int, int], None] | None,
) -> int:
    added = 0

    def missing() -> Iterator[list[Series]]:
        nonlocal added
        done = 0
        for batch in catalogue.batches(_BATCH):
            new = [
                row
                for row in batch
                if index.lookup(row.series_uid, permission=TRUE, columns=_UID) is None
            ]
            done += len(batch)
            added += len(new)
            if on_row is not None:
                on_row(done, total)
            if new:
                yield new

    batches = missing()
    first = next(batches, None)
    if first is not None:
        index.add_segment(chain([first], batches))
    return added
