"""The one door to the catalogue: nothing of it reaches a project but through here.

Each request gets an `Access` of its own, with the permission of its project on that day. What
it gives is within that permission, counts too; no query and no choice of values widens it.
"""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import pyarrow as pa

from kakehashi.store.dicom import UID
from kakehashi.store.facets import FACETS, CancelledError
from kakehashi.store.facets.export import schema_of
from kakehashi.store.query import COLUMNS, TRUE, Query, any_of, matches, value_of
from kakehashi.store.service import models

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from kakehashi.store.catalogue import Catalogue, Series
    from kakehashi.store.facets import Cancel, Index
    from kakehashi.store.query import Value

_PIECE = 5_000
_BATCH = 500
_NOBODY: dict[str, Any] = dict.fromkeys(COLUMNS) | {"flags": ()}


@dataclass(frozen=True)
class Scope:
    """Which series a request is about, as far as the project may see them."""

    query: Query = TRUE
    selections: Mapping[str, frozenset[Value]] = field(default_factory=dict)

    @property
    def whole(self) -> Query:
        """The query with the chosen values as conditions."""
        query = self.query
        for column, values in self.selections.items():
            query &= any_of(column, values)
        return query


class _Limits(TypedDict):
    query: Query
    selections: Mapping[str, frozenset[Value]]
    permission: Query
    cancel: Cancel


class Access:
    """What one project may see now.

    Parameters
    ----------
    index : Index
    catalogue : Catalogue
        The record, for single series and lists of them.
    permission : Query
    cancel : Cancel
        Ends its searches.
    """

    def __init__(
        self, index: Index, catalogue: Catalogue, permission: Query, cancel: Cancel
    ) -> None:
        self._index = index
        self._catalogue = catalogue
        self._permission = permission
        self._cancel = cancel

    def _within(self, scope: Scope) -> _Limits:
        """Return what every search of the index gets; there is no other way to it."""
        return {
            "query": scope.query,
            "selections": scope.selections,
            "permission": self._permission,
            "cancel": self._cancel,
        }

    def count(self, scope: Scope) -> int:
        """Count series."""
        return self._index.count(**self._within(scope))

    def facets(self, scope: Scope, columns: Sequence[str] | None) -> models.FacetsAnswer:
        """Count series by the values of facets, all of them by default."""
        found = self._index.facets(
            columns=FACETS if columns is None else tuple(dict.fromkeys(columns)),
            **self._within(scope),
        )
        return models.FacetsAnswer(
            count=found.total,
            facets={
                name: [models.FacetValue(value=value, count=count) for value, count in values]
                for name, values in found.counts.items()
            },
        )

    def page(self, scope: Scope, asked: models.PageRequest) -> models.PageAnswer:
        """Return a page of rows."""
        found = self._index.page(
            order=asked.order,
            descending=asked.descending,
            offset=asked.after,
            limit=asked.limit,
            **self._within(scope),
        )
        following = asked.after + len(found.rows)
        return models.PageAnswer(
            count=found.total,
            rows=list(found.rows),
            next=following if found.rows and following < found.total else None,
        )

    def histogram(self, scope: Scope, column: str, bins: int) -> models.HistogramAnswer:
        """Count series by ranges of a number or a date."""
        found = self._index.histogram(column, bins, **self._within(scope))
        return models.HistogramAnswer(
            bins=[
                models.Bin(low=low, high=high, count=count)
                for (low, high), count in zip(
                    itertools.pairwise(found.edges), found.counts, strict=True
                )
            ],
            unknown=found.unknown,
        )

    def pivot(self, scope: Scope, rows: str, columns: str) -> models.PivotAnswer:
        """Count series by two columns."""
        found = self._index.pivot(rows, columns, **self._within(scope))
        return models.PivotAnswer(
            rows=list(found.rows),
            columns=list(found.columns),
            counts=[list(line) for line in found.counts],
        )

    def combinations(
        self, scope: Scope, columns: Sequence[str], limit: int
    ) -> models.CombinationsAnswer:
        """Count series by several columns together, the most frequent first."""
        found = self._index.combinations(columns, **self._within(scope))
        return models.CombinationsAnswer(
            combinations=[
                models.Combination(values=list(values), count=count)
                for values, count in found[:limit]
            ],
            total=len(found),
        )

    def facilities(self, scope: Scope) -> frozenset[str]:
        """Return the facilities that series are from."""
        found = self._index.facets(columns=("facility",), **self._within(Scope(scope.whole)))
        return frozenset(str(value) for value, _ in found.counts["facility"] if value is not None)

    def studies(
        self, scope: Scope, wanted: Collection[str]
    ) -> dict[tuple[str, str | None], list[str]]:
        """Return those of some studies of which there are series, with these, sorted.

        By study and facility: a UID says nothing of who sent it.
        """
        among = Scope(scope.query & any_of("study_uid", wanted), scope.selections)
        columns = ("study_uid", "facility", "series_uid")
        found: dict[tuple[str, str | None], list[str]] = {}
        for batch in self._index.arrow(columns=columns, **self._within(among)):
            for row in batch.to_pylist():
                study = row["study_uid"], row["facility"]
                found.setdefault(study, []).append(row["series_uid"])
        return {study: sorted(series) for study, series in found.items()}

    def uids(self, scope: Scope) -> list[str]:
        """Return all SeriesInstanceUIDs, sorted."""
        return sorted(self._index.select(**self._within(scope)))

    def lines(self, scope: Scope, columns: Sequence[str], limit: int) -> Iterator[bytes]:
        """Yield rows as JSON, one a line."""
        for piece in self._pieces(scope, columns, limit):
            yield b"".join(as_json(row) + b"\n" for row in piece.to_pylist())

    def arrow(self, scope: Scope, columns: Sequence[str], limit: int) -> Iterator[bytes]:
        """Yield rows as an Arrow IPC stream, whole even if there is no row."""
        sink = io.BytesIO()
        writer = None
        for piece in self._pieces(scope, columns, limit):
            writer = writer or pa.ipc.new_stream(sink, piece.schema)
            writer.write_batch(piece)
            yield sink.getvalue()
            sink.seek(0)
            sink.truncate()
        writer = writer or pa.ipc.new_stream(sink, schema_of(tuple(dict.fromkeys(columns))))
        writer.close()
        yield sink.getvalue()

    def _pieces(self, scope: Scope, columns: Sequence[str], limit: int) -> Iterator[pa.RecordBatch]:
        names = tuple(dict.fromkeys(columns))
        for batch in self._index.arrow(columns=names, **self._within(scope)):
            for start in range(0, min(len(batch), limit), _PIECE):
                yield batch.slice(start, min(_PIECE, limit - start))
            limit -= min(len(batch), limit)
            if limit == 0:
                return

    def series(self, uid: str) -> Series | None:
        """Return the record of a series, None if there is none or it is not permitted."""
        found = self._catalogue.select(any_of("series_uid", (uid,))) if UID.fullmatch(uid) else []
        row = found[0] if found else None
        # The same is done for one that is not there, so that the time taken says nothing.
        permitted = matches(self._permission, row or _NOBODY)
        return row if permitted else None

    def records(self, uids: Iterable[str]) -> Iterator[Series]:
        """Yield the records of those of some series that are permitted, sorted by UID.

        Raises
        ------
        CancelledError
            Nobody waits for them any more.
        """
        wanted = sorted(uids)
        for start in range(0, len(wanted), _BATCH):
            if self._cancel.flag.value:
                raise CancelledError("the list was given up; ask again")
            rows = self._catalogue.select(any_of("series_uid", wanted[start : start + _BATCH]))
            # A database may have another order of text, which the hash of a list must not know.
            for row in sorted(rows, key=lambda row: row.series_uid):
                if matches(self._permission, row):
                    yield row


def row_of(row: Series) -> dict[str, Any]:
    """Return a record as the index gives rows."""
    return {name: value_of(row, name) for name in COLUMNS} | {"flags": row.flags}


def as_json(value: Any) -> bytes:
    """Return a value as JSON; dates are written as ISO 8601."""
    return json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), default=lambda date: date.isoformat()
    ).encode()
