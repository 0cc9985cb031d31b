"""Keeps the index of facets level with the catalogue's record."""

from __future__ import annotations

import secrets
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from kakehashi.store.facets import Index
from kakehashi.store.facets.index import INDEX
from kakehashi.store.layout import Layout, give_to_group, locked
from kakehashi.store.query import any_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kakehashi.config import StoreHost
    from kakehashi.store.catalogue import Catalogue, Series

MOST_SEGMENTS = 16
"""Small segments that are let stand; with more of them they become one."""

SMALL = 200_000
"""Rows up to which a segment counts as small."""

_BATCH = 20_000
_AT_ONCE = 500


class Changed(NamedTuple):
    """What became of an index.

    Attributes
    ----------
    entered : int
        Series that were added or replaced.
    removed : int
        Series that the catalogue has no more.
    """

    entered: int
    removed: int


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
        if _is_level(catalogue, index):
            _follow(catalogue, index)
        elif index.mark is None and not index.rows:
            # A new one lacks all that there is: nothing is saved by waiting.
            _compare(catalogue, index, None)
        else:
            # The next `catch_up` compares everything; until then at least these are found.
            _replace(catalogue, index, [row.series_uid for row in rows])
    if index.segments > MOST_SEGMENTS:
        index.compact(SMALL)


def catch_up(
    store: StoreHost,
    catalogue: Catalogue,
    index: Index,
    on_row: Callable[[int, int], None] | None = None,
) -> Changed:
    """Make the index say what the catalogue says; return what had to be changed.

    The catalogue lists what changed since the last time, which costs nothing where nothing did.
    All rows are compared only if catalogue or index are not the ones that were level then: one
    came from a backup, or is new.

    Parameters
    ----------
    on_row : callable, optional
        Called with (series looked at, series in all), where all are compared.
    """
    # Nobody withdraws, or packs, while it is found out what is missing.
    with locked(Layout(store.root).packs / ".lock", wait=True):
        if _is_level(catalogue, index):
            changed = _follow(catalogue, index)
            # What was written past the catalogue's own interface shows here, if anywhere.
            if index.rows == catalogue.count():
                return changed
        return _compare(catalogue, index, on_row)


def _is_level(catalogue: Catalogue, index: Index) -> bool:
    return index.mark is not None and index.mark == catalogue.mark()


def _follow(catalogue: Catalogue, index: Index) -> Changed:
    """Take over what the catalogue lists as changed."""
    changes = catalogue.changes()
    if not changes:
        return Changed(0, 0)
    changed = _replace(catalogue, index, changes)
    _agree(catalogue, index, changes)
    return changed


def _agree(catalogue: Catalogue, index: Index, changes: Sequence[str]) -> None:
    """Mark both as level. Cut off in between they are not, and all is compared."""
    mark = secrets.token_hex(16)
    index.set_mark(mark)
    catalogue.followed(changes, mark)


def _replace(catalogue: Catalogue, index: Index, uids: Sequence[str]) -> Changed:
    """Make the index have some series as the catalogue has them, which may be not at all."""
    there: set[str] = set()

    def batches() -> Iterator[list[Series]]:
        for start in range(0, len(uids), _AT_ONCE):
            some = catalogue.select(any_of("series_uid", uids[start : start + _AT_ONCE]))
            there.update(row.series_uid for row in some)
            if some:
                yield some

    entered = _add(index, batches())
    return Changed(entered, index.withdraw(uid for uid in uids if uid not in there))


def _compare(
    catalogue: Catalogue, index: Index, on_row: Callable[[int, int], None] | None
) -> Changed:
    changes = catalogue.changes()
    total = catalogue.count()
    comparison = index.comparison()

    def differing() -> Iterator[list[Series]]:
        done = 0
        for batch in catalogue.batches(_BATCH):
            different = comparison.differing(batch)
            done += len(batch)
            if on_row is not None:
                on_row(done, total)
            if different:
                yield different

    changed = Changed(_add(index, differing()), index.withdraw(comparison.ghosts()))
    _agree(catalogue, index, changes)
    return changed


def _add(index: Index, batches: Iterator[list[Series]]) -> int:
    first = next(batches, None)
    return 0 if first is None else index.add_segment(chain([first], batches))
