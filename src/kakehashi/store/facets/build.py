"""Builds a segment: rows become codes, sorted by date of the study."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kakehashi.errors import StoreError
from kakehashi.store.facets.batches import as_batch
from kakehashi.store.facets.dictionary import FLAG_SEPARATOR, STORED
from kakehashi.store.facets.files import Writer
from kakehashi.store.facets.identifiers import hashes_of, joined, keys_of
from kakehashi.store.layout import PART, sync_folder
from kakehashi.store.query import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from kakehashi.store.catalogue import Series
    from kakehashi.store.query import Column

    Progress = Callable[[str, int], None]
    """Told of a step by name, and how many rows or columns are done."""

SORTED_BY = "study_date"
_PIECE = 1 << 22
_MAX_ROWS = 2**32 - 1


def build_segment(
    folder: Path,
    batches: Iterable[pa.RecordBatch | Sequence[Series]],
    *,
    progress: Progress | None = None,
) -> int:
    """Build a segment: a folder of memory-mapped codes, whole or not at all.

    What is held in memory grows with the values that differ, not with the rows; 16 bytes a row
    go to a file beside it for a while.

    Parameters
    ----------
    folder : Path
        Where it shall be; nothing may be there.
    batches : iterable of pyarrow.RecordBatch or of sequences of Series
        The rows, each series once. A batch has all columns of `COLUMNS`.
    progress : callable, optional

    Returns
    -------
    int
        Rows.

    Raises
    ------
    StoreError
        Rows are not as expected, or the folder cannot be written. Nothing is left.
    """
    part = folder.with_name(folder.name + PART)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, mode=0o750)
        rows = _Build(part, progress or (lambda _step, _done: None)).run(batches)
        part.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise StoreError(f"{error.filename}: {error.strerror}; no segment is built") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return rows


class _Build:
    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress

    def run(self, batches: Iterable[pa.RecordBatch | Sequence[Series]]) -> int:
        collected: dict[str, _Codes] = {}
        for name, column in COLUMNS.items():
            kind = _Names if column.kind == "identifier" else _Values
            collected[name] = kind(column, self._folder / f"{name}{PART}")
        rows = 0
        for given in batches:
            batch = as_batch(given)
            rows += len(batch)
            if rows > _MAX_ROWS:
                raise StoreError(f"a segment holds at most {_MAX_ROWS} rows")
            for name, codes in collected.items():
                codes.add(batch.column(name))
            self._progress("reading", rows)
        codes_of_days = collected[SORTED_BY].codes()
        order = None
        if (codes_of_days[1:] < codes_of_days[:-1]).any():
            order = np.argsort(codes_of_days, kind="stable").astype(np.uint32)
        columns = {}
        with Writer(self._folder) as writer:
            for done, (name, codes) in enumerate(collected.items()):
                if name == "series_uid":
                    codes.finish_rows(writer, order)
                else:
                    columns[name] = codes.finish(writer, order)
                codes.drop()
                self._progress("writing", done + 1)
            writer.finish(rows, columns)
        return rows


class _Codes:
    """One column while rows come in: provisional codes in a file, 0 is not known."""

    def __init__(self, column: Column, path: Path) -> None:
        self.name = column.name
        self.column = column
        self._path = path
        self._file = path.open("wb+")
        self._rows = 0

    def add(self, array: pa.Array) -> None:
        """Take the next rows."""
        encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
        indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        # The last place stands for -1: not known.
        table = np.append(self._take(encoded.dictionary), 0).astype(np.uint32)
        self._file.write(table[indices])
        self._rows += len(indices)

    def _take(self, values: pa.Array) -> npt.NDArray[Any]:
        """Return the provisional codes of values."""
        raise NotImplementedError

    def _ranks(self) -> tuple[npt.NDArray[Any], int]:
        """Return the final code of each provisional one, and how many there are."""
        raise NotImplementedError

    def _provisional(self) -> npt.NDArray[np.uint32]:
        self._file.flush()
        if not self._rows:
            return np.empty(0, np.uint32)
        return np.memmap(self._path, np.uint32, mode="r")

    def codes(self) -> npt.NDArray[Any]:
        """Return the final codes of all rows, in the order in which they came."""
        ranks, size = self._ranks()
        return ranks.astype(_width(size))[self._provisional()]

    def finish(self, writer: Writer, order: npt.NDArray[np.uint32] | None) -> dict[str, Any]:
        """Write codes and values; return what ``meta.json`` says of the column."""
        ranks, size = self._ranks()
        dtype = _width(size)
        ranks = ranks.astype(dtype)
        provisional = self._provisional()
        counts = np.zeros(size, np.int64)

        def pieces() -> Iterator[npt.NDArray[Any]]:
            for start in range(0, self._rows, _PIECE):
                stop = min(start + _PIECE, self._rows)
                part = provisional[start:stop] if order is None else provisional[order[start:stop]]
                codes = ranks[part]
                np.add(counts, np.bincount(codes, minlength=size), out=counts)
                yield codes

        writer.add(f"{self.name}.codes", pieces())
        writer.add(f"{self.name}.counts", [counts])
        self._write_values(writer)
        return {"width": dtype.itemsize, "size": size}

    def _write_values(self, writer: Writer) -> None:
        raise NotImplementedError

    def finish_rows(self, writer: Writer, order: npt.NDArray[np.uint32] | None) -> None:
        """Write the values themselves, row by row."""
        raise NotImplementedError

    def drop(self) -> None:
        """Take the file away."""
        self._file.close()
        self._path.unlink()


class _Values(_Codes):
    """Text, numbers, days, flags."""

    def __init__(self, column: Column, path: Path) -> None:
        super().__init__(column, path)
        self._text: dict[str, int] = {}
        dtype = STORED.get(column.kind, "<f8")
        self._numbers = np.empty(0, dtype)  # sorted
        self._codes_of = np.empty(0, np.uint32)

    def add(self, array: pa.Array) -> None:
        if self.column.kind == "flags":
            array = pc.binary_join(array, FLAG_SEPARATOR)
        elif self.column.kind == "date":
            array = array.cast(pa.int32())
        elif self.column.kind == "boolean":
            array = array.cast(pa.uint8())
        super().add(array)

    def _take(self, values: pa.Array) -> npt.NDArray[Any]:
        if self.column.kind not in STORED:
            seen = self._text
            return np.array(
                [
                    # A series without flags is one without a value.
                    0
                    if text is None or (not text and self.column.kind == "flags")
                    else seen.setdefault(text, len(seen) + 1)
                    for text in values.to_pylist()
                ],
                np.uint32,
            )
        numbers = values.fill_null(0).to_numpy(zero_copy_only=False)
        unknown = values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
        if self.column.kind == "date":
            numbers = numbers + _EPOCH
        numbers = numbers.astype(self._numbers.dtype)
        if self.column.kind == "number":
            numbers = np.where(unknown, 0.0, numbers) + 0.0  # no -0.0
        known = np.flatnonzero(~unknown)
        known = known[np.argsort(numbers[known], kind="stable")]
        ordered = numbers[known]
        fresh = ordered[~_among(ordered, self._numbers)]
        fresh = fresh[np.append(True, fresh[1:] != fresh[:-1])[: len(fresh)]]
        if len(fresh):
            places = np.searchsorted(self._numbers, fresh)
            ids = np.arange(len(fresh), dtype=np.uint32) + len(self._numbers) + 1
            self._numbers = np.insert(self._numbers, places, fresh)
            self._codes_of = np.insert(self._codes_of, places, ids)
        codes = np.zeros(len(numbers), np.uint32)
        codes[known] = self._codes_of[np.searchsorted(self._numbers, ordered)]
        return codes

    def _ranks(self) -> tuple[npt.NDArray[Any], int]:
        if self.column.kind in STORED:
            ranks = np.zeros(len(self._numbers) + 1, np.uint32)
            ranks[self._codes_of] = np.arange(1, len(self._numbers) + 1)
        else:
            ranks = np.zeros(len(self._text) + 1, np.uint32)
            for rank, text in enumerate(sorted(self._text), start=1):
                ranks[self._text[text]] = rank
        return ranks, len(ranks)

    def _write_values(self, writer: Writer) -> None:
        if self.column.kind in STORED:
            writer.add(f"{self.name}.values", [self._numbers])
            return
        blob, offsets = joined(sorted(self._text))
        writer.add(f"{self.name}.values", [blob])
        writer.add(f"{self.name}.offsets", [offsets])


class _Names(_Codes):
    """Identifiers: each batch's own come with their keys, and are made one at the end."""

    def __init__(self, column: Column, path: Path) -> None:
        super().__init__(column, path)
        self._keys: list[npt.NDArray[np.uint64]] = []
        self._plain: list[npt.NDArray[np.bool_]] = []
        self._texts: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        self._taken = 0
        self._chosen: npt.NDArray[Any] = np.empty(0, np.int64)  # one place of each

    def add(self, array: pa.Array) -> None:
        if array.null_count:
            raise StoreError(f"the column {self.name} has a value that is not known")
        super().add(array)

    def _take(self, values: pa.Array) -> npt.NDArray[Any]:
        offsets = np.frombuffer(values.buffers()[1], np.int64) if len(values) else np.zeros(1, int)
        offsets = offsets[values.offset : values.offset + len(values) + 1]
        data = values.buffers()[2] if len(values) else None
        blob = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        keys, plain = keys_of(blob, offsets)
        self._keys.append(keys)
        self._plain.append(plain)
        self._texts.append(_cut(blob, offsets, np.flatnonzero(~plain)))
        codes = np.arange(len(values), dtype=np.uint32) + np.uint32(self._taken + 1)
        self._taken += len(values)
        return codes

    def _all(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        if len(self._keys) != 1:
            self._keys = [np.concatenate([np.empty((0, 2), np.uint64), *self._keys])]
            self._plain = [np.concatenate([np.empty(0, bool), *self._plain])]
        return self._keys[0], self._plain[0]

    def _ranks(self) -> tuple[npt.NDArray[Any], int]:
        keys, plain = self._all()
        order, first = _sorted_by_hash(keys, plain)
        ranks = np.zeros(len(keys) + 1, np.uint32)
        ranks[order + 1] = np.cumsum(first)
        self._chosen = order[first]
        return ranks, len(self._chosen) + 1

    def _write_values(self, writer: Writer) -> None:
        writer.add(f"{self.name}.hashes", [hashes_of(self._all()[0][self._chosen])])
        self._write(writer, self._chosen)

    def _write(self, writer: Writer, chosen: npt.NDArray[Any]) -> None:
        """Write the identifiers in the order given: keys, and the texts of those that have one."""
        keys, plain = self._all()
        writer.add(f"{self.name}.keys", (keys[piece] for piece in _pieces(chosen)))
        others = np.flatnonzero(~plain[chosen])
        writer.add(f"{self.name}.others", [others.astype(np.uint32)])
        blob = np.concatenate([np.empty(0, np.uint8), *(text for text, _ in self._texts)])
        lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(at) for _, at in self._texts)])
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        numbers = (np.cumsum(~plain) - 1)[chosen[others]]
        texts = [_cut(blob, offsets, piece) for piece in _pieces(numbers)]
        writer.add(f"{self.name}.values", (text for text, _ in texts))
        ends = np.concatenate([np.zeros(1, np.int64), *(np.diff(at) for _, at in texts)])
        writer.add(f"{self.name}.offsets", [np.cumsum(ends)])

    def finish_rows(self, writer: Writer, order: npt.NDArray[np.uint32] | None) -> None:
        keys, plain = self._all()
        rows = np.arange(len(keys)) if order is None else order
        twice = StoreError("a series is there twice; give each series once")
        if self._rows != len(keys):
            raise twice
        by_hash, first = _sorted_by_hash(keys[rows], plain[rows])
        if not first.all():
            raise twice
        writer.add(f"{self.name}.hashes", [hashes_of(keys[rows])[by_hash]])
        writer.add(f"{self.name}.order", [by_hash.astype(np.uint32)])
        self._write(writer, rows)


_EPOCH = 719163
"""1970-01-01 counted from year 1."""


def _among(values: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Say which values are among others, which are sorted."""
    if not len(others):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(others, values), len(others) - 1)
    found: npt.NDArray[np.bool_] = others[places] == values
    return found


def _sorted_by_hash(
    keys: npt.NDArray[np.uint64], plain: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return the order by hash, and which places in it hold an identifier for the first time."""
    hashes = hashes_of(keys)
    order = np.argsort(hashes, kind="stable")

    def changes() -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        one, two = order[:-1], order[1:]
        other = (keys[one] != keys[two]).any(axis=1) | (plain[one] != plain[two])
        return other, hashes[one] == hashes[two]

    other, same_hash = changes()
    if (other & same_hash).any():  # different identifiers of one hash: keep the same ones together
        order = np.lexsort((plain, keys[:, 1], keys[:, 0], hashes))
        other, same_hash = changes()
    return order, np.append(np.ones(min(1, len(keys)), bool), other)


def _cut(
    blob: npt.NDArray[Any], offsets: npt.NDArray[Any], chosen: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return some of the texts, one after the other, and where they begin and end."""
    lengths = offsets[chosen + 1] - offsets[chosen]
    ends = np.zeros(len(chosen) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    places = np.repeat(offsets[chosen] - ends[:-1], lengths) + np.arange(ends[-1])
    return blob[places], ends


def _pieces(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(array), _PIECE):
        yield array[start : start + _PIECE]


def _width(size: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if size <= 256 else np.uint16 if size <= 65536 else np.uint32)
