"""From a query to the scan of one segment: tables over codes, and a program for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kakehashi.store.facets.scan import AND, NOT, OR, Scan
from kakehashi.store.query import FALSE, TRUE, And, Condition, Not, Or, Query

if TYPE_CHECKING:
    import numpy.typing as npt

    from kakehashi.store.facets.scan import Cancel
    from kakehashi.store.facets.segment import Segment

_ROW = "series_uid"
"""The column without codes: each row has its own."""


def columns_of(query: Query) -> frozenset[str]:
    """Return the columns that a query speaks of."""
    match query:
        case And(parts) | Or(parts):
            return frozenset().union(*map(columns_of, parts))
        case Not(part):
            return columns_of(part)
        case Condition(column):
            return frozenset({column})
    raise TypeError(f"{query!r} is not a query")


def plan(
    segment: Segment,
    query: Query,
    alive: npt.NDArray[np.uint8] | None,
    cancel: Cancel | None,
) -> Scan | None:
    """Return the scan of a segment that lets through what meets a query.

    Conditions on one column are a table over its codes, the most selective first; what joins
    several columns by ``or`` is a program over such tables.

    Parameters
    ----------
    segment : Segment
    query : Query
    alive : ndarray of uint8, optional
        A bit for each row that is not withdrawn.
    cancel : Cancel, optional

    Returns
    -------
    Scan or None
        None where no row can pass.
    """
    if query == FALSE or not segment.rows:
        return None
    scan = Scan(segment.rows, cancel)
    tables: list[tuple[int, str, npt.NDArray[np.uint8]]] = []
    single, rest = _by_column(query.parts if isinstance(query, And) else (query,))
    for column, part in single.items():
        dictionary = segment.dictionary(column)
        table = dictionary.passing(part)
        passing = int(dictionary.counts @ table.astype(np.int64))
        if not passing:
            return None
        if passing < segment.rows:
            tables.append((passing, column, table))
    for _, column, table in sorted(tables, key=lambda item: item[:2]):
        zones = zones_of(segment, table) if column == "study_date" else None
        scan.add_filter(segment.codes(column), table, zones)
    if alive is not None:
        scan.add_bits(alive)
    for part in rest:
        scan.add_program(_program(segment, scan, part))
    return scan


def _by_column(parts: tuple[Query, ...]) -> tuple[dict[str, Query], list[Query]]:
    """Return parts on a single column, joined by and, and the parts on several."""
    single: dict[str, Query] = {}
    rest: list[Query] = []
    for part in parts:
        columns = columns_of(part)
        if len(columns) == 1 and _ROW not in columns:
            (column,) = columns
            single[column] = single.get(column, TRUE) & part
        else:
            rest.append(part)
    return single, rest


def _program(segment: Segment, scan: Scan, query: Query) -> list[int]:
    columns = columns_of(query)
    if len(columns) == 1 and _ROW not in columns:
        (column,) = columns
        table = segment.dictionary(column).passing(query)
        return [scan.add_term(segment.codes(column), table)]
    match query:
        case Condition():
            return _rows(segment, scan, query)
        case Not(part):
            return [*_program(segment, scan, part), NOT]
        case And(parts) | Or(parts):
            if not parts:
                bits = np.full(-(-segment.rows // 8), 255 if query == TRUE else 0, np.uint8)
                return [scan.add_bit_term(bits)]
            steps = _program(segment, scan, parts[0])
            for part in parts[1:]:
                steps += [*_program(segment, scan, part), AND if isinstance(query, And) else OR]
            return steps
    raise TypeError(f"{query!r} is not a query")


def _rows(segment: Segment, scan: Scan, condition: Condition) -> list[int]:
    """Return the program of a condition on the rows' own identifiers, which all are known."""
    found = segment.series.find([str(value) for value in condition.values if value is not None])
    bits = np.zeros(segment.rows, bool)
    bits[found[found >= 0]] = True
    term = scan.add_bit_term(np.packbits(bits, bitorder="little"))
    return [term] if condition.op in {"==", "in"} else [term, NOT]


def zones_of(segment: Segment, table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return for each block whether no row, some or all of them pass by their date."""
    before = np.zeros(len(table) + 1, np.int64)
    np.cumsum(table, out=before[1:])
    first, last = segment.dates
    passing = before[last + 1] - before[first]
    return np.where(passing == 0, 0, np.where(passing == last - first + 1, 2, 1)).astype(np.uint8)
