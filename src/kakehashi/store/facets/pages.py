"""A page of rows in the order of any column, without sorting the rows.

How many rows there are of each value says which values a page needs; only their rows are looked
for. So a page far down costs what the first one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kakehashi.store.facets.answers import Page
from kakehashi.store.facets.dictionary import STORED
from kakehashi.store.facets.plan import zones_of
from kakehashi.store.query import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kakehashi.store.facets.scan import Scan
    from kakehashi.store.facets.segment import Segment


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of one value in one segment that belong onto the page."""

    code: int
    place: int
    """Of the run, on the page."""
    skip: int
    room: int
    whole: bool


def page_of(
    scans: Iterable[tuple[Segment, Scan]],
    order: str,
    columns: Sequence[str],
    *,
    descending: bool,
    offset: int,
    limit: int,
) -> Page:
    """Return a page of the rows that pass scans, sorted by a column, the unknown last."""
    passing = list(scans)
    counts = []
    for segment, scan in passing:
        column = (segment.codes(order), segment.dictionary(order).size, None)
        counts.append(scan.count([column])[0].astype(np.int64))
    total = sum(int(own.sum()) for own in counts)
    parts, codes = _by_value(
        [segment for segment, _ in passing], counts, order, descending=descending
    )
    sizes = np.array([0], np.int64)
    if len(parts):
        sizes = np.zeros(len(parts) + 1, np.int64)
        for number, own in enumerate(counts):
            here = np.flatnonzero(parts == number)
            sizes[here + 1] = own[codes[here]]
    ends = np.cumsum(sizes)
    begin, end = min(offset, total), min(offset + limit, total)
    first = int(np.searchsorted(ends, begin, side="right")) - 1
    runs: dict[int, list[_Run]] = {}
    while first < len(parts) and ends[first] < end:
        skip = max(begin - int(ends[first]), 0)
        stop = min(end, int(ends[first + 1]))
        size = int(sizes[first + 1])
        room = stop - int(ends[first]) - skip
        run = _Run(int(codes[first]), first, skip, room, whole=room == size)
        runs.setdefault(int(parts[first]), []).append(run)
        first += 1
    found: list[tuple[int, dict[str, Any]]] = []
    for number, own_runs in runs.items():
        segment, scan = passing[number]
        rows, places = _rows(segment, scan, order, own_runs)
        found += zip(places.tolist(), segment.table(columns, rows), strict=True)
    found.sort(key=lambda item: item[0])
    return Page(total, tuple(row for _, row in found))


def _by_value(
    segments: Sequence[Segment],
    counts: Sequence[npt.NDArray[np.int64]],
    order: str,
    *,
    descending: bool,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return all codes that have rows, with the number of their segment, in order of values."""
    known = [np.flatnonzero(own[1:]) + 1 for own in counts]
    parts = np.repeat(np.arange(len(known)), [len(own) for own in known])
    codes = np.concatenate([np.empty(0, np.int64), *known])
    if COLUMNS[order].kind in STORED:
        ranks = [
            segment.dictionary(order).ranks(own)
            for segment, own in zip(segments, known, strict=True)
        ]
        keys = np.concatenate([np.empty(0, np.uint8), *ranks])
    else:
        texts = [
            text
            for segment, own in zip(segments, known, strict=True)
            for text in segment.dictionary(order).decode(own)
        ]
        rank = {text: number for number, text in enumerate(sorted(set(texts)))}
        keys = np.array([rank[text] for text in texts], np.int64)
    # Each segment's part is sorted already, which this sort makes use of.
    by_value = np.argsort(keys, kind="stable")
    if descending:
        by_value = by_value[::-1]
    unknown = np.array([number for number, own in enumerate(counts) if own[0]], np.int64)
    return (
        np.concatenate([parts[by_value], unknown]),
        np.concatenate([codes[by_value], np.zeros(len(unknown), np.int64)]),
    )


def _rows(
    segment: Segment, scan: Scan, order: str, runs: Sequence[_Run]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Return a segment's rows of some runs, and the place of each one's run on the page."""
    codes = segment.codes(order)
    size = segment.dictionary(order).size
    whole = [run for run in runs if run.whole]
    groups = [[run] for run in runs if not run.whole] + ([whole] if whole else [])
    rows, places = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
    for group in groups:
        table = np.zeros(size, np.uint8)
        place = np.zeros(size, np.int64)
        for run in group:
            table[run.code] = 1
            place[run.code] = run.place
        zones = zones_of(segment, table) if order == "study_date" else None
        with scan.narrowed(codes, table, zones):
            room = sum(run.room for run in group)
            found = list(scan.rows(skip=group[0].skip, limit=room))
        rows += found
        places += [place[codes[piece]] for piece in found]
    return np.concatenate(rows), np.concatenate(places)
