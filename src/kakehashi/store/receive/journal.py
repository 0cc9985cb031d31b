"""The record of what happened to objects: appended by many processes, never changed.

A position is that of the end of a line, so a reader finds its place at once. A file is named by
the position at which it begins: microseconds since 1970, or the end of the file before it where
that is more. No journal grows by a megabyte a second for long, so positions of a journal that was
lost lie before all of the next one.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import signal
import time
import zlib
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kakehashi.errors import StoreError
from kakehashi.store.layout import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

ROTATE = 16 << 20
"""Bytes from which on a new file is begun."""

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_SUFFIX = ".jsonl"
_LOG = logging.getLogger(__name__)

Row = dict[str, Any]


class ForeignPositionError(StoreError):
    """A position is of another journal; whoever had it begins again at 0."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of the journal with their positions; may be gone through more than once.

    Attributes
    ----------
    files : tuple of (int, Path)
        Files, each with the position at which it begins.
    after, end : int
        Positions between which the rows are.
    """

    files: tuple[tuple[int, Path], ...]
    after: int
    end: int

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return self.having("", self.after)

    def having(self, key: str, after: int) -> Iterator[tuple[int, Row]]:
        """Yield the rows behind a position that have a key; others cost next to nothing.

        Parameters
        ----------
        key : str
            Any row has the empty one.
        after : int
            Not before that of all these rows.
        """
        wanted = f'"{key}":'.encode() if key else b""
        for number, (start, path) in enumerate(self.files):
            if number + 1 < len(self.files) and self.files[number + 1][0] <= after:
                continue
            try:
                file = path.open("rb")
            except FileNotFoundError:
                # Dropped meanwhile, so nothing in it is of any use.
                continue
            with file:
                position = start + file.seek(max(after - start, 0))
                for line in file:
                    position += len(line)
                    if position > self.end:
                        return
                    if wanted not in line:
                        continue
                    row = _parse(line)
                    if row is None:
                        _LOG.warning("%s: damaged before byte %d", path, position - start)
                    else:
                        yield position, row


class Journal:
    """One JSON object a line, each behind its checksum.

    Parameters
    ----------
    folder : Path
        Where its files and its lock are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Signals are the main thread's.
        self._waiter = ThreadPoolExecutor(
            1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, _STOPPING)
        )
        self._descriptor = -1
        self._start = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep all others from the journal, and from the names that it speaks of."""
        with self._locked(fcntl.LOCK_EX):
            yield

    def append(self, rows: Sequence[Row], beside: Callable[[], None] | None = None) -> list[int]:
        """Add rows that survive a power cut on return; the lock must be held.

        Parameters
        ----------
        rows : sequence of dict
        beside : callable, optional
            What waits for the disk at the same time; file systems make one wait of it.

        Returns
        -------
        list of int
            The position of each.

        Raises
        ------
        OSError
            They cannot be written, or the other failed; none of them stands there.
        """
        descriptor, before = self._newest_for_writing()
        # A line that a dying process left half written must not swallow the next one.
        torn = before > 0 and os.pread(descriptor, 1, before - 1) != b"\n"
        data = b"\n" if torn else b""
        positions = []
        for row in rows:
            data += _line(row)
            positions.append(self._start + before + len(data))
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            waiting = None if beside is None else self._waiter.submit(beside)
            try:
                os.fdatasync(descriptor)
            finally:
                if waiting is not None:
                    waiting.result()
        except OSError:
            os.ftruncate(descriptor, before)
            raise
        return positions

    def mend(self) -> None:
        """Cut off the half line that a dying writer left at the end; the lock must be held."""
        descriptor, size = self._newest_for_writing()
        whole = size
        while whole and os.pread(descriptor, 1, whole - 1) != b"\n":
            whole -= 1
        if whole < size:
            os.ftruncate(descriptor, whole)
            os.fdatasync(descriptor)

    def rows(self, after: int = 0, *, held: bool = False) -> Rows:
        """Return what stands behind a position and is durable now.

        Parameters
        ----------
        after : int
        held : bool
            The caller holds the lock.

        Raises
        ------
        ForeignPositionError
            The position is neither 0 nor one of this journal.
        """
        with nullcontext() if held else self._locked(fcntl.LOCK_SH):
            files, end = self._durable()
        newest = bisect([start for start, _ in files], after) - 1
        if after and not (newest >= 0 and after <= _end(files, newest, end)):
            raise ForeignPositionError(
                f"position {after} is none of the journal in {self._folder}, which ends at {end}; "
                "it is from another journal, or the journal is an older copy. Begin again at 0"
            )
        return Rows(tuple(files[max(newest, 0) :]), after, end)

    def drop(self, position: int, alive: Collection[int]) -> None:
        """Remove files that lie wholly before a position; takes the lock, for that alone.

        Parameters
        ----------
        position : int
        alive : collection of int
            Positions of rows that must stay; their files do.
        """
        staying = sorted(alive)
        dead = [
            path
            for (start, path), (stop, _) in itertools.pairwise(self._files())
            if stop <= position and bisect(staying, start) == bisect(staying, stop)
        ]
        with self.held():
            for path in dead:
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def _files(self) -> list[tuple[int, Path]]:
        paths = (path for path in self._folder.iterdir() if path.suffix == _SUFFIX)
        return sorted((int(path.stem), path) for path in paths)

    def _durable(self) -> tuple[list[tuple[int, Path]], int]:
        """Return all files, and the position of the end of what survives a power cut."""
        files = self._files()
        if not files:
            return files, 0
        start, path = files[-1]
        # A writer that was killed may have left whole lines that are not on the disk yet.
        # Whoever acted on one and noted its position would pass over others later.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
            return files, start + os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def _newest_for_writing(self) -> tuple[int, int]:
        """Return the newest file, opened, and its size; begin a new one if that is large."""
        if self._descriptor >= 0:
            status = os.fstat(self._descriptor)
            if status.st_nlink and status.st_size < ROTATE:
                return self._descriptor, status.st_size
        # Others rotate, and drop, too: the newest that is there, and only behind it a new one.
        files = self._files()
        self._open(files[-1][0] if files else _now())
        while (size := os.fstat(self._descriptor).st_size) >= ROTATE:
            self._open(max(self._start + size, _now()))
        return self._descriptor, size

    def _open(self, start: int) -> None:
        path = self._folder / f"{start:020}{_SUFFIX}"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        sync_folder(self._folder)
        self.close()
        self._descriptor, self._start = descriptor, start

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _now() -> int:
    return time.time_ns() // 1000


def _end(files: Sequence[tuple[int, Path]], number: int, end: int) -> int:
    """Return the position of the end of a file."""
    start, path = files[number]
    return end if number + 1 == len(files) else start + path.stat().st_size


def _line(row: Row) -> bytes:
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Row | None:
    """Return what a line holds, None if it is torn or damaged."""
    text = line[9:-1]
    if line[-1:] != b"\n" or line[:9] != b"%08x " % zlib.crc32(text):
        return None
    row = json.loads(text)
    return row if isinstance(row, dict) else None
