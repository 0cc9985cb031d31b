"""An index against the record: which rows it lacks or has otherwise, and which are too many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kakehashi.store.query import COLUMNS, value_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kakehashi.store.catalogue import Series
    from kakehashi.store.facets.search import Part

_NAMES = tuple(COLUMNS)


class Comparison:
    """One generation of an index, compared with rows of the record as they come.

    Two bytes for each row of the index are held in memory.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = [(part.segment, part.bits()) for part in parts]
        self._seen = [np.zeros(segment.rows, bool) for segment, _ in self._parts]

    def differing(self, rows: Sequence[Series]) -> list[Series]:
        """Return those of some rows that the index has not, or not once, or otherwise."""
        uids = [row.series_uid for row in rows]
        copies, same = np.zeros(len(rows), int), np.zeros(len(rows), int)
        for (segment, alive), seen in zip(self._parts, self._seen, strict=True):
            found = segment.series.find(uids)
            at = np.flatnonzero(found >= 0)
            at = at[alive[found[at]]]
            seen[found[at]] = True
            for place, said in zip(at.tolist(), segment.table(_NAMES, found[at]), strict=True):
                copies[place] += 1
                same[place] += said == as_indexed(rows[place])
        wrong = np.flatnonzero((copies != 1) | (same != 1))
        return [rows[place] for place in wrong.tolist()]

    def ghosts(self) -> Iterator[str]:
        """Yield the series of the index that were in none of the rows so far."""
        for (segment, alive), seen in zip(self._parts, self._seen, strict=True):
            for some in segment.contents(alive & ~seen):
                yield from some


def as_indexed(row: Series) -> dict[str, Any]:
    """Return a row of the record as the index gives it."""
    return {name: value_of(row, name) for name in _NAMES} | {"flags": row.flags}
