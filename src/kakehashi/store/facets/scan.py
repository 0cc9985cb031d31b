"""The scan in C with its arguments as arrays."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kakehashi.errors import StoreError
from kakehashi.store.facets.library import load
from kakehashi.store.facets.segment import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

THREADS: Final = len(os.sched_getaffinity(0))
AND, OR, NOT = -1, -2, -3
_CANCELLED, _NO_MEMORY = 1, 2
_PIECE = 1 << 20


class CancelledError(StoreError):
    """The scan was given up, because nobody waits for its answer any more."""


class Cancel:
    """A wish to stop that a running scan sees within a millisecond; from any thread."""

    def __init__(self) -> None:
        self.flag = ctypes.c_int32(0)

    def set(self) -> None:
        """Stop what runs with this, and what is started with it later."""
        self.flag.value = 1


class _Filter(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("passing", ctypes.c_void_p),
        ("zones", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("size", ctypes.c_int64),
    ]


class _Facet(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
    ]


class _Scan(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("filters", ctypes.c_void_p),
        ("filter_count", ctypes.c_int64),
        ("terms", ctypes.c_void_p),
        ("program", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        ("cancel", ctypes.c_void_p),
    ]


class Scan:
    """Which rows of a segment pass; then counts of them, or the rows themselves.

    Parameters
    ----------
    rows : int
        Of the segment.
    cancel : Cancel, optional
    """

    def __init__(self, rows: int, cancel: Cancel | None) -> None:
        self._rows = rows
        self._cancel = cancel
        self._filters: list[_Filter] = []
        self._terms: list[_Filter] = []
        self._program: list[int] = []
        self._kept: list[Any] = []  # arrays that the structures point to

    def add_filter(
        self,
        codes: npt.NDArray[Any],
        passing: npt.NDArray[np.uint8],
        zones: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Let only rows through whose code passes.

        Parameters
        ----------
        codes : ndarray
            One a row.
        passing : ndarray of uint8
            0 or 1 for each code.
        zones : ndarray of uint8, optional
            For each block 0 (no row passes), 1 (some may) or 2 (all do).
        """
        self._filters.append(self._filter(codes, passing, zones))

    def add_bits(self, bits: npt.NDArray[np.uint8]) -> None:
        """Let only rows through whose bit is set, the lowest first in each byte."""
        self._filters.append(self._bits(bits))

    def add_term(self, codes: npt.NDArray[Any], passing: npt.NDArray[np.uint8]) -> int:
        """Give the program a term; return its number."""
        self._terms.append(self._filter(codes, passing, None))
        return len(self._terms) - 1

    def add_bit_term(self, bits: npt.NDArray[np.uint8]) -> int:
        """Give the program bits as a term; return its number."""
        self._terms.append(self._bits(bits))
        return len(self._terms) - 1

    def add_program(self, steps: Sequence[int]) -> None:
        """Let only rows through for which this holds: terms, AND, OR, NOT in postfix order."""
        self._program += [*steps, *([AND] if self._program else [])]

    @contextmanager
    def narrowed(
        self,
        codes: npt.NDArray[Any],
        passing: npt.NDArray[np.uint8],
        zones: npt.NDArray[np.uint8] | None = None,
    ) -> Iterator[None]:
        """Look at one more filter first, for a while."""
        self._filters.insert(0, self._filter(codes, passing, zones))
        try:
            yield
        finally:
            del self._filters[0]

    def count(self, columns: Sequence[tuple[Any, int, Any]]) -> list[npt.NDArray[np.uint64]]:
        """Count codes over the rows that pass, and that all *other* columns' choices pass.

        Parameters
        ----------
        columns : sequence of (codes, size, chosen)
            ``chosen``: 0 or 1 for each code, or None where nothing is chosen.

        Returns
        -------
        list of ndarray
            Of each column, ``size`` counts.
        """
        counts = [np.zeros(size, np.uint64) for _, size, _ in columns]
        facets = self._facets(columns, counts)
        self._check(load().facets_count(self._scan(), facets, len(columns)))
        return counts

    def cells(self, columns: Sequence[tuple[Any, int]]) -> npt.NDArray[np.uint64]:
        """Count the rows that pass for each combination of codes.

        Returns
        -------
        ndarray
            Of the columns' sizes; without columns one number of shape ().
        """
        shape = tuple(size for _, size in columns)
        cells = np.zeros(shape, np.uint64)
        strides = np.array([*(stride // 8 for stride in cells.strides), 0], np.int64)
        facets = self._facets([(codes, size, None) for codes, size in columns], None)
        status = load().facets_cells(
            self._scan(), facets, len(columns), strides.ctypes.data, cells.ctypes.data, cells.size
        )
        self._check(status)
        return cells

    def rows(self, *, skip: int = 0, limit: int | None = None) -> Iterator[npt.NDArray[np.uint32]]:
        """Yield the rows that pass, in order, in pieces.

        Parameters
        ----------
        skip : int
            Leave out so many of the first.
        limit : int, optional
            End after so many.
        """
        left = self._rows if limit is None else limit
        at = ctypes.c_int64(0)
        scan = self._scan()
        while left > 0 and at.value < self._rows:
            out = np.empty(min(left, _PIECE) + BLOCK, np.uint32)
            found = load().facets_rows(scan, ctypes.addressof(at), skip, out.ctypes.data, len(out))
            self._check(-min(found, 0))
            skip = 0
            if found:
                yield out[: min(found, left)]
                left -= found

    def _scan(self) -> Any:
        filters = (_Filter * len(self._filters))(*self._filters)
        terms = (_Filter * len(self._terms))(*self._terms)
        program = np.array(self._program, np.int32)
        self._kept += [filters, terms, program]
        scan = _Scan(
            self._rows,
            THREADS,
            ctypes.addressof(filters),
            len(filters),
            ctypes.addressof(terms),
            program.ctypes.data,
            len(program),
            None if self._cancel is None else ctypes.addressof(self._cancel.flag),
        )
        self._kept.append(scan)
        return ctypes.addressof(scan)

    def _facets(self, columns: Sequence[tuple[Any, int, Any]], counts: Any) -> Any:
        facets = (_Facet * len(columns))()
        for number, (codes, size, chosen) in enumerate(columns):
            table = None if chosen is None else _padded(chosen, codes)
            self._kept += [codes, table]
            facets[number] = _Facet(
                codes.ctypes.data,
                None if table is None else table.ctypes.data,
                codes.itemsize,
                size,
                None if counts is None else counts[number].ctypes.data,
            )
        self._kept.append(facets)
        return ctypes.addressof(facets)

    def _filter(self, codes: Any, passing: Any, zones: Any) -> _Filter:
        padded = _padded(passing, codes)
        self._kept += [codes, padded, zones]
        return _Filter(
            codes.ctypes.data,
            padded.ctypes.data,
            None if zones is None else zones.ctypes.data,
            codes.itemsize,
            len(passing),
        )

    def _bits(self, bits: npt.NDArray[np.uint8]) -> _Filter:
        if len(bits) * 8 < self._rows:
            raise StoreError(f"{len(bits)} bytes are too few for {self._rows} rows")
        self._kept.append(bits)
        return _Filter(bits.ctypes.data, None, None, 0, 0)

    def _check(self, status: int) -> None:
        if status == _CANCELLED:
            raise CancelledError("the search was given up; ask again")
        if status == _NO_MEMORY:
            raise StoreError("there is too little memory for the search; ask for fewer columns")
        if status:
            raise StoreError("the search is too deep for the scan; ask a simpler one")


def _padded(table: npt.NDArray[np.uint8], codes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Give a table room for every code of one or two bytes, as the scan demands."""
    room = {1: 256, 2: 65536}.get(codes.itemsize, len(table))
    padded = np.zeros(max(room, 1), np.uint8)
    padded[: len(table)] = table
    return padded
