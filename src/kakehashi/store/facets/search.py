"""Searches over the segments of an index: every answer is exact, and within the permission."""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kakehashi.errors import StoreError
from kakehashi.store.facets.answers import Facets, Histogram, Page, Pivot
from kakehashi.store.facets.export import batch_of
from kakehashi.store.facets.pages import page_of
from kakehashi.store.facets.plan import columns_of, plan
from kakehashi.store.query import COLUMNS, FALSE, TRUE, any_of, column_named, matches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt
    import pyarrow as pa

    from kakehashi.store.facets.scan import Cancel, Scan
    from kakehashi.store.facets.segment import Segment
    from kakehashi.store.query import Query, Value

FACETS: Final = tuple(name for name, column in COLUMNS.items() if column.facet)
"""Columns whose values are offered with their counts."""
_MAX_CELLS = 1 << 23
_ORDERED = {"text", "number", "integer", "date", "boolean"}


@dataclass(frozen=True, slots=True)
class Part:
    """A segment of one generation of an index.

    Attributes
    ----------
    alive : ndarray of uint8 or None
        A bit for each row that is not withdrawn; None if none is.
    """

    segment: Segment
    alive: npt.NDArray[np.uint8] | None

    def bits(self) -> npt.NDArray[np.bool_]:
        """Say for each row whether it is not withdrawn."""
        count = self.segment.rows
        if self.alive is None:
            return np.ones(count, bool)
        return np.unpackbits(self.alive, count=count, bitorder="little").astype(bool)


class Searches:
    """What can be asked of an index.

    All searches take the same arguments: ``query``; ``permission``, what the asking project may
    see, which no selection ever widens; ``selections``, the values chosen in facets, a set for each
    column; ``cancel``, by which another thread gives the search up.

    Raises
    ------
    StoreError
        A column or value is not as expected, or the index cannot be read; so do all methods.
    CancelledError
        The search was given up.
    """

    def _parts(self) -> tuple[Part, ...]:
        """Return the segments of the newest generation."""
        raise NotImplementedError

    def facets(
        self,
        query: Query = TRUE,
        *,
        permission: Query,
        selections: Mapping[str, frozenset[Value]] | None = None,
        columns: Sequence[str] = FACETS,
        cancel: Cancel | None = None,
    ) -> Facets:
        """Count the values of columns, each under all selections but its own (drill sideways)."""
        chosen = {name: any_of(name, values) for name, values in (selections or {}).items()}
        columns = tuple(dict.fromkeys(columns))
        for name in columns:
            _need_facet(name)
        base = query & permission
        for name, part in chosen.items():
            if name not in columns:
                base &= part
        shown = {name: chosen[name] for name in columns if name in chosen}
        found: dict[str, Counter[Value]] = {name: Counter() for name in columns}
        total = 0
        for segment, scan in self._scans(base, cancel):
            tables = {name: segment.dictionary(name).passing(part) for name, part in shown.items()}
            counts = scan.count(
                [
                    (segment.codes(name), segment.dictionary(name).size, tables.get(name))
                    for name in columns
                ]
            )
            for name, numbers in zip(columns, counts, strict=True):
                _add_values(found[name], segment, name, numbers)
            total += _total(scan, columns, counts, tables)
        return Facets(total, {name: _most_frequent(counter) for name, counter in found.items()})

    def count(
        self,
        query: Query = TRUE,
        *,
        permission: Query,
        selections: Mapping[str, frozenset[Value]] | None = None,
        cancel: Cancel | None = None,
    ) -> int:
        """Count series."""
        asked = _all(query, permission, selections)
        return sum(int(scan.cells([])) for _, scan in self._scans(asked, cancel))

    def page(
        self,
        query: Query = TRUE,
        *,
        permission: Query,
        selections: Mapping[str, frozenset[Value]] | None = None,
        order: str = "study_date",
        descending: bool = True,
        offset: int = 0,
        limit: int = 50,
        columns: Sequence[str] = tuple(COLUMNS),
        cancel: Cancel | None = None,
    ) -> Page:
        """Return some rows.

        Parameters
        ----------
        order : str
            Column by which rows are sorted, not an identifier; what is not known comes last.
            Rows of the same value keep one order as long as the index is the same.
        descending : bool
            The largest first.
        offset, limit : int
            How many rows are left out before, and how many there are at most.
        columns : sequence of str
            What is said of each row.
        """
        _need(order, _ORDERED)
        for name in columns:
            column_named(name)
        if offset < 0 or limit < 0:
            raise StoreError("offset and limit are 0 or more")
        asked = _all(query, permission, selections)
        scans = self._scans(asked, cancel)
        return page_of(scans, order, columns, descending=descending, offset=offset, limit=limit)

    def histogram(
        self,
        column: str,
        bins: int | Sequence[float | dt.date] = 20,
        query: Query = TRUE,
        *,
        permission: Query,
        selections: Mapping[str, frozenset[Value]] | None = None,
        cancel: Cancel | None = None,
    ) -> Histogram:
        """Count series by ranges of a number or date.

        Parameters
        ----------
        bins : int or sequence
            So many ranges of one width between the smallest and largest value found, or the
            edges, growing; what lies outside them is not counted.
        """
        _need(column, {"number", "integer", "date"})
        unknown = 0
        pieces = [(np.empty(0), np.empty(0, np.int64))]
        for segment, scan in self._scans(_all(query, permission, selections), cancel):
            dictionary = segment.dictionary(column)
            (counts,) = scan.count([(segment.codes(column), dictionary.size, None)])
            unknown += int(counts[0])
            codes = np.flatnonzero(counts[1:]) + 1
            pieces.append((dictionary.ranks(codes), counts[codes].astype(np.int64)))
        values = np.concatenate([own for own, _ in pieces]).astype(np.float64)
        numbers = np.concatenate([own for _, own in pieces])
        return _binned(values, numbers, bins, unknown, dates=COLUMNS[column].kind == "date")

    def combinations(
        self,
        columns: Sequence[str],
        query: Query = TRUE,
        *,
        permission: Query,
        selections: Mapping[str, frozenset[Value]] | None = None,
        cancel: Cancel | None = None,
    ) -> tuple[tuple[tuple[Value, ...], int], ...]:
        """Count the combinations of several columns' values that are there; most frequent first."""
        for name in columns:
            _need_facet(name)
            _need(name, _ORDERED)
        asked = _all(query, permission, selections)
        found: Counter[Any] = Counter()
        for segment, scan in self._scans(asked, cancel):
            for codes, counts in _cells(segment, scan, columns):
                values = [
                    segment.dictionary(name).decode(own)
                    for name, own in zip(columns, codes.T, strict=True)
                ]
                for key, count in zip(zip(*values, strict=True), counts.tolist(), strict=True):
                    found[key] += count
        return _most_frequent(found)

    def pivot(
        self,
        rows: str,
        columns: str,
        query: Query = TRUE,
        *,
        permission: Query,
        selections: Mapping[str, frozenset[Value]] | None = None,
        cancel: Cancel | None = None,
    ) -> Pivot:
        """Count two columns against each other, e.g. vendor and facility."""
        cells = dict(
            self.combinations(
                (rows, columns), query, permission=permission, selections=selections, cancel=cancel
            )
        )
        down = sorted({one for one, _ in cells}, key=_unknown_first)
        across = sorted({two for _, two in cells}, key=_unknown_first)
        counts = tuple(tuple(cells.get((one, two), 0) for two in across) for one in down)
        return Pivot(tuple(down), tuple(across), counts)

    def lookup(
        self, series_uid: str, *, permission: Query, columns: Sequence[str] = tuple(COLUMNS)
    ) -> dict[str, Any] | None:
        """Return one series, None if it is not there, withdrawn, or not permitted."""
        for name in columns:
            column_named(name)
        for part in self._parts():
            row = part.segment.series.find([series_uid])
            if row[0] < 0 or not _is_alive(part, int(row[0])):
                continue
            needed = tuple(dict.fromkeys((*columns, *columns_of(permission))))
            (found,) = part.segment.table(needed, row) or ({},)
            if matches(permission, found):
                return {name: found[name] for name in columns}
        return None

    def select(
        self,
        query: Query = TRUE,
        *,
        permission: Query,
        selections: Mapping[str, frozenset[Value]] | None = None,
        cancel: Cancel | None = None,
    ) -> Iterator[str]:
        """Yield the identifiers of series, as they come; memory does not grow with them."""
        for segment, scan in self._scans(_all(query, permission, selections), cancel):
            for rows in scan.rows():
                yield from segment.series.texts(rows)

    def arrow(
        self,
        query: Query = TRUE,
        columns: Sequence[str] = tuple(COLUMNS),
        *,
        permission: Query,
        selections: Mapping[str, frozenset[Value]] | None = None,
        cancel: Cancel | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows as Arrow batches of one schema, at most about a million rows each.

        Text is dictionary-encoded; a dictionary holds only values that are in its batch.
        """
        for name in columns:
            column_named(name)
        for segment, scan in self._scans(_all(query, permission, selections), cancel):
            for rows in scan.rows():
                yield batch_of(segment, columns, rows)

    def _scans(self, asked: Query, cancel: Cancel | None) -> Iterator[tuple[Segment, Scan]]:
        if asked == FALSE:
            return
        for part in self._parts():
            scan = plan(part.segment, asked, part.alive, cancel)
            if scan is not None:
                yield part.segment, scan


def _all(
    query: Query, permission: Query, selections: Mapping[str, frozenset[Value]] | None
) -> Query:
    for name, values in (selections or {}).items():
        query &= any_of(name, values)
    return query & permission


def _need(column: str, kinds: set[str]) -> None:
    kind = column_named(column).kind
    if kind not in kinds:
        raise StoreError(f"{column} is of kind {kind}; expected a column of {sorted(kinds)}")


def _need_facet(column: str) -> None:
    if not column_named(column).facet:
        raise StoreError(f"{column} is no facet; expected one of {', '.join(FACETS)}")


def _total(
    scan: Scan,
    columns: Sequence[str],
    counts: Sequence[npt.NDArray[np.uint64]],
    tables: Mapping[str, npt.NDArray[np.uint8]],
) -> int:
    """Return how many rows met everything: any column's counts say so, over what it chose."""
    if not columns:
        return int(scan.cells([]))
    table = tables.get(columns[0])
    return int((counts[0] if table is None else counts[0][table == 1]).sum())


def _add_values(
    counter: Counter[Any], segment: Segment, column: str, counts: npt.NDArray[np.uint64]
) -> None:
    codes = np.flatnonzero(counts)
    values = segment.dictionary(column).decode(codes)
    for value, count in zip(values, counts[codes].tolist(), strict=True):
        for one in (value or (None,)) if COLUMNS[column].kind == "flags" else (value,):
            counter[one] += count


def _most_frequent(counter: Counter[Any]) -> tuple[tuple[Any, int], ...]:
    return tuple(sorted(counter.items(), key=lambda item: (-item[1], _unknown_first(item[0]))))


def _unknown_first(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_unknown_first, value))
    return (value is not None, 0 if value is None else value)


def _is_alive(part: Part, row: int) -> bool:
    return part.alive is None or bool(part.alive[row >> 3] >> (row & 7) & 1)


def _cells(
    segment: Segment, scan: Scan, columns: Sequence[str]
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Yield combinations of codes, of shape (n, columns), and their counts."""
    sizes = [segment.dictionary(name).size for name in columns]
    codes = [segment.codes(name) for name in columns]
    if math.prod(sizes) <= _MAX_CELLS:
        cells = scan.cells(list(zip(codes, sizes, strict=True)))
        yield np.argwhere(cells), cells[cells > 0]
        return
    for rows in scan.rows():
        table = np.stack([own[rows].astype(np.uint32) for own in codes], axis=1)
        yield np.unique(table, axis=0, return_counts=True)


def _binned(
    values: npt.NDArray[np.float64],
    counts: npt.NDArray[np.int64],
    bins: int | Sequence[Any],
    unknown: int,
    *,
    dates: bool,
) -> Histogram:
    if isinstance(bins, int):
        if not 1 <= bins <= 1000:
            raise StoreError(f"{bins} ranges were asked for; from 1 to 1000 are possible")
        if not len(values):
            return Histogram((), (), unknown)
        low, high = values.min(), values.max()
        if high == low:
            high = low + max(1.0, abs(low) * 2**-40)  # a step that such a number has
        edges = np.linspace(low, high, bins + 1)
        edges = np.unique(np.floor(edges) if dates else edges)
    else:
        edges = np.array([v.toordinal() if dates else v for v in bins], np.float64)
        if len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise StoreError("the edges of ranges are at least two, and grow")
    inside = (values >= edges[0]) & (values <= edges[-1])
    place = np.minimum(np.searchsorted(edges, values[inside], side="right") - 1, len(edges) - 2)
    binned = np.zeros(len(edges) - 1, np.int64)
    np.add.at(binned, place, counts[inside])
    shown = [dt.date.fromordinal(int(edge)) if dates else float(edge) for edge in edges.tolist()]
    return Histogram(tuple(shown), tuple(binned.tolist()), unknown)
