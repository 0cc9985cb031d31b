"""The values of one column in one segment: code 0 is not known, the others stand sorted."""

from __future__ import annotations

import datetime as dt
from bisect import bisect_left, bisect_right
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kakehashi.store.facets.identifiers import Identifiers
from kakehashi.store.query import And, Condition, Not, Or, fold

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kakehashi.store.facets.files import Reader
    from kakehashi.store.query import Column, Kind, Query

FLAG_SEPARATOR: Final = "\x1f"
"""Between the flags of one series, which are one value."""
STORED: Final[dict[Kind, str]] = {
    "number": "<f8",
    "integer": "<i8",
    "date": "<i4",
    "boolean": "<u1",
}
"""How values are kept; days as their number since year 1."""


class Dictionary:
    """What a column's codes mean.

    Attributes
    ----------
    size : int
        Codes are below this.
    counts : ndarray
        Rows of each code in the segment, withdrawn ones too.
    """

    def __init__(self, column: Column, files: Reader) -> None:
        self.column = column
        self._files = files
        self.size = int(files.meta["columns"][column.name]["size"])

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """Rows of each code."""
        return self._files.map(f"{self.column.name}.counts", np.int64)

    @cached_property
    def identifiers(self) -> Identifiers:
        """Values of a column of identifiers; code 1 is at position 0."""
        return read_identifiers(self._files, self.column.name, ordered=False)

    @cached_property
    def _stored(self) -> Any:
        """Values from code 1, sorted, as they are compared: a list of text, or an array."""
        name = self.column.name
        if self.column.kind in STORED:
            return self._files.map(f"{name}.values", STORED[self.column.kind])
        offsets = self._files.map(f"{name}.offsets", np.int64).tolist()
        blob = self._files.map(f"{name}.values", np.uint8).tobytes()
        return [blob[begin:end].decode() for begin, end in pairwise(offsets)]

    @cached_property
    def _folded(self) -> list[str]:
        return [fold(text) for text in self._stored]

    def decode(self, codes: npt.NDArray[Any]) -> list[Any]:
        """Return the values of some codes, as `Series` has them."""
        places = codes.astype(np.int64) - 1
        known = np.flatnonzero(places >= 0)
        found: list[Any] = [() if self.column.kind == "flags" else None] * len(codes)
        for at, value in zip(known.tolist(), self._values(places[known]), strict=True):
            found[at] = value
        return found

    def _values(self, places: npt.NDArray[np.int64]) -> list[Any]:
        match self.column.kind:
            case "identifier":
                return self.identifiers.texts(places)
            case "date":
                return list(map(dt.date.fromordinal, self._stored[places].tolist()))
            case "boolean":
                return list(map(bool, self._stored[places].tolist()))
            case "number" | "integer":
                return list(self._stored[places].tolist())
            case "flags":
                return [self._flags[place] for place in places.tolist()]
        return [self._stored[place] for place in places.tolist()]

    @cached_property
    def _flags(self) -> list[tuple[str, ...]]:
        return [tuple(text.split(FLAG_SEPARATOR)) for text in self._stored]

    def ranks(self, codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return numbers that stand to each other as the values of codes from 1 do.

        They are the numbers themselves, days from year 1, or 0 and 1; not for text.
        """
        ranks: npt.NDArray[Any] = self._stored[codes.astype(np.int64) - 1]
        return ranks

    def passing(self, query: Query) -> npt.NDArray[np.uint8]:
        """Say for each code whether it meets a query that is on this column alone."""
        match query:
            case And(parts):
                return self._all([self.passing(part) for part in parts], np.minimum, 1)
            case Or(parts):
                return self._all([self.passing(part) for part in parts], np.maximum, 0)
            case Not(part):
                return self.passing(part) ^ np.uint8(1)
            case Condition():
                return self._holds(query)
        raise TypeError(f"{query!r} is not a query")

    def _all(self, tables: Sequence[Any], join: np.ufunc, start: int) -> npt.NDArray[np.uint8]:
        table = np.full(self.size, start, np.uint8)
        for other in tables:
            join(table, other, out=table)
        return table

    def _holds(self, condition: Condition) -> npt.NDArray[np.uint8]:
        op, values = condition.op, condition.values
        table = np.zeros(self.size, np.uint8)
        if op in {"==", "in", "!=", "not in"}:
            table[self._codes(values)] = 1
            if op in {"!=", "not in"}:
                table ^= 1
                table[0] = 0
        elif op == "contains" and self.column.kind == "flags":
            table[1:] = [values[0] in flags for flags in self._flags]
        elif op == "contains":
            wanted = fold(str(values[0]))
            table[1:] = [wanted in text for text in self._folded]
        else:
            value = self._as_stored(values[0])
            low, high = bisect_left(self._stored, value), bisect_right(self._stored, value)
            begin = {"<": 0, "<=": 0, ">": high, ">=": low}[op]
            end = {"<": low, "<=": high}.get(op, self.size - 1)
            table[1 + begin : 1 + end] = 1
        return table

    def _codes(self, values: Sequence[Any]) -> list[int]:
        known = [value for value in values if value is not None]
        codes = [0] if len(known) < len(values) else []
        if self.column.kind == "identifier":
            positions = self.identifiers.find(known)
            return codes + [int(position) + 1 for position in positions if position >= 0]
        for value in map(self._as_stored, known):
            place = bisect_left(self._stored, value)
            if place < len(self._stored) and self._stored[place] == value:
                codes.append(place + 1)
        return codes

    def _as_stored(self, value: Any) -> Any:
        return value.toordinal() if isinstance(value, dt.date) else value


def read_identifiers(files: Reader, name: str, *, ordered: bool) -> Identifiers:
    """Return a column's identifiers; ``ordered``: positions are rows, not sorted by hash."""
    return Identifiers(
        files.map(f"{name}.keys", np.uint64).reshape(-1, 2),
        files.map(f"{name}.others", np.uint32),
        files.map(f"{name}.values", np.uint8),
        files.map(f"{name}.offsets", np.int64),
        hashes=files.map(f"{name}.hashes", np.uint64),
        order=files.map(f"{name}.order", np.uint32) if ordered else None,
    )
