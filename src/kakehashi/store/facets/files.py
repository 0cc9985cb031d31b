"""The data of a segment: arrays as they lie in memory, one after the other in one file.

One file, because each is made durable by itself: with a hundred of them, adding one series took
as long as adding a million.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kakehashi.errors import StoreError
from kakehashi.store.layout import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import numpy.typing as npt

VERSION = 1
META = "meta.json"
DATA = "data.bin"
_ALIGNED = 64
_MEBIBYTE = 1 << 20


class Writer:
    """Writes the arrays of a segment into a folder that is not in use yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, dict[str, Any]] = {}
        self._file = (folder / DATA).open("wb")
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, pieces: Iterable[npt.NDArray[Any]]) -> None:
        """Write an array, piece by piece."""
        gap = -self._end % _ALIGNED
        self._file.write(bytes(gap))
        begin = self._end + gap
        digest = hashlib.sha256()
        size = 0
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            self._file.write(data)
            digest.update(data)
            size += len(data)
        self._end = begin + size
        self._arrays[name] = {"begin": begin, "size": size, "sha256": digest.hexdigest()}

    def finish(self, rows: int, columns: dict[str, dict[str, Any]]) -> None:
        """Make the data durable, and write ``meta.json``."""
        self._file.flush()
        os.fsync(self._file.fileno())
        meta = {
            "version": VERSION,
            "rows": rows,
            "bytes": self._end,
            "columns": columns,
            "arrays": self._arrays,
        }
        with replacing(self._folder / META) as file:
            file.write(json.dumps(meta, indent=1).encode())


class Reader:
    """Maps the data of a segment into memory; it is read where it is touched.

    Raises
    ------
    StoreError
        A file is missing, of another length, or of another release.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / META).read_bytes())
            if self.meta["version"] != VERSION:
                raise StoreError(
                    f"{folder} is of version {self.meta['version']}, expected {VERSION}; "
                    "build the index anew"
                )
            size, expected = (folder / DATA).stat().st_size, int(self.meta["bytes"])
            if size != expected:
                raise StoreError(
                    f"{folder / DATA} has {size} bytes, expected {expected}; build the index anew"
                )
            with (folder / DATA).open("rb") as file:
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            self._data: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        except FileNotFoundError as error:
            raise StoreError(f"{error.filename} is missing; build the index anew") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{folder} cannot be read ({error}); build the index anew") from error

    def map(self, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of the data."""
        wrong = StoreError(
            f"{self._folder / META}: {name} is not as expected; build the index anew"
        )
        try:
            place = self.meta["arrays"][name]
            begin, size = int(place["begin"]), int(place["size"])
            if begin % _ALIGNED or not 0 <= begin <= begin + size <= len(self._data):
                raise wrong
            return self._data[begin : begin + size].view(dtype)
        except (KeyError, TypeError, ValueError) as error:
            raise wrong from error

    def prefetch(self, name: str, positions: npt.NDArray[Any], width: int) -> None:
        """Have the disk read some items of an array, of ``width`` bytes, without waiting."""
        begin = int(self.meta["arrays"][name]["begin"])
        places = begin + positions.astype(np.int64) * width
        for page in np.unique(places // mmap.PAGESIZE).tolist():
            self._map.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, 1)

    def warm(self) -> None:
        """Read everything once, so that the system has it in its cache."""
        piece = bytearray(_MEBIBYTE)
        with (self._folder / DATA).open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass

    def verify(self, take: Callable[[int], None]) -> list[str]:
        """Return the names of arrays that are not as they were written; reads everything.

        Parameters
        ----------
        take : callable
            Told of bytes as they are read; it may take its time.
        """
        bad = []
        for name, place in self.meta["arrays"].items():
            data = self.map(name, np.uint8).data
            digest = hashlib.sha256()
            for start in range(0, len(data), _MEBIBYTE):
                piece = data[start : start + _MEBIBYTE]
                digest.update(piece)
                take(len(piece))
            if digest.hexdigest() != place["sha256"]:
                bad.append(name)
        return bad
