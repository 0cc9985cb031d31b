"""One segment as it is searched: rows sorted by date, codes for each column."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kakehashi.errors import StoreError
from kakehashi.store.facets.dictionary import Dictionary, read_identifiers
from kakehashi.store.facets.files import Reader
from kakehashi.store.query import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from kakehashi.store.facets.identifiers import Identifiers

BLOCK = 4096
"""Rows that the scan takes together."""
_FEW = 64
_PIECE = 10_000
_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class Segment:
    """An open segment.

    Raises
    ------
    StoreError
        A file is missing or not as expected.
    """

    def __init__(self, folder: Path) -> None:
        self._files = Reader(folder)
        self.folder = folder
        try:
            self.rows = int(self._files.meta["rows"])
            self._dictionaries = {
                name: Dictionary(column, self._files)
                for name, column in COLUMNS.items()
                if name != "series_uid"
            }
            self._codes = {
                name: self._files.map(f"{name}.codes", _TYPES[facts["width"]])
                for name, facts in self._files.meta["columns"].items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{folder} is not as expected ({error!r}); build the index anew"
            ) from (error)
        for name, codes in self._codes.items():
            if len(codes) != self.rows:
                raise StoreError(f"{folder}: {name} has {len(codes)} rows, expected {self.rows}")

    def dictionary(self, column: str) -> Dictionary:
        """Return what a column's codes mean."""
        return self._dictionaries[column]

    def codes(self, column: str) -> npt.NDArray[Any]:
        """Return a column's codes, one a row."""
        return self._codes[column]

    @cached_property
    def series(self) -> Identifiers:
        """The rows' own identifiers."""
        return read_identifiers(self._files, "series_uid", ordered=True)

    @cached_property
    def dates(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """First and last code of the date in each block: rows are sorted by it."""
        codes = self.codes("study_date")
        return codes[::BLOCK].astype(np.int64), codes[
            np.minimum(np.arange(BLOCK - 1, self.rows + BLOCK - 1, BLOCK), self.rows - 1)
        ].astype(np.int64)

    def decode(self, column: str, rows: npt.NDArray[Any]) -> list[Any]:
        """Return a column's values in some rows."""
        if column == "series_uid":
            return self.series.texts(rows)
        return self.dictionary(column).decode(self.codes(column)[rows])

    def table(self, columns: Sequence[str], rows: npt.NDArray[Any]) -> list[dict[str, Any]]:
        """Return some rows, each a mapping of columns to values."""
        if len(rows) <= _FEW:
            # Each column lies elsewhere: all pages are asked for before the first is waited for.
            for column in columns:
                if column != "series_uid":
                    self._files.prefetch(f"{column}.codes", rows, self.codes(column).itemsize)
        values = [self.decode(column, rows) for column in columns]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    def warm(self) -> None:
        """Read everything once, so that the system has it in its cache."""
        self._files.warm()

    def verify(self, take: Callable[[int], None]) -> list[str]:
        """Return the names of arrays that are wrong; reads everything.

        They are not as they were written, or have a code that their dictionary has not.

        Parameters
        ----------
        take : callable
            Told of bytes as they are read; it may take its time.
        """
        bad = self._files.verify(take)
        for name, codes in self._codes.items():
            # A code too high would count beside the scan's tables.
            high = max((int(piece.max()) for piece in _pieces(codes)), default=-1)
            if high >= self.dictionary(name).size and f"{name}.codes" not in bad:
                bad.append(f"{name}.codes")
        return bad

    def contents(self, alive: npt.NDArray[np.bool_]) -> Iterator[list[str]]:
        """Yield the identifiers of some rows, some at a time."""
        for rows in _pieces(np.flatnonzero(alive)):
            yield self.series.texts(rows)


def _pieces(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(array), _PIECE):
        yield array[start : start + _PIECE]
