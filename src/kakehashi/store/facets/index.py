"""An index: segments and what was withdrawn from them, changed by replacing one small file."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kakehashi.errors import StoreError
from kakehashi.store.facets.build import build_segment
from kakehashi.store.facets.compare import Comparison
from kakehashi.store.facets.search import Part, Searches
from kakehashi.store.facets.segment import Segment
from kakehashi.store.layout import locked, replacing, sync_folder
from kakehashi.store.query import TRUE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt
    import pyarrow as pa

    from kakehashi.store.catalogue import Series
    from kakehashi.store.facets.build import Progress

VERSION = 1
INDEX = "index.json"
_SEGMENTS = "segments"
_BUILDING = "building"
_LOCK = ".lock"
_ATTEMPTS = 5


class Index(Searches):
    """An index in a folder; readers see the newest generation, whole.

    Made by :meth:`create` or :meth:`open`. Processes that add or compact wait for each other;
    to withdraw waits for neither.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._state: tuple[tuple[int, int], dict[str, Any], tuple[Part, ...]] | None = None

    @classmethod
    def create(cls, folder: Path) -> Self:
        """Make an empty index.

        Raises
        ------
        StoreError
            There is one already.
        """
        if (folder / INDEX).exists():
            raise StoreError(f"{folder} holds an index already; open it")
        (folder / _SEGMENTS).mkdir(parents=True, exist_ok=True, mode=0o750)
        _write(folder, {"version": VERSION, "generation": 0, "next": 1, "segments": []})
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an index. Nothing is read but its small files.

        Raises
        ------
        StoreError
            It is missing, damaged or of another release.
        """
        index = cls(folder)
        index._parts()
        return index

    @property
    def rows(self) -> int:
        """Series, without those withdrawn."""
        return self.count(TRUE, permission=TRUE)

    @property
    def generation(self) -> int:
        """Grows with each change."""
        return int(self._newest()[0]["generation"])

    @property
    def segments(self) -> int:
        """How many segments there are; with many small ones, :meth:`compact`."""
        return len(self._parts())

    @property
    def mark(self) -> str | None:
        """What :meth:`set_mark` was told the last time."""
        found = self._newest()[0].get("mark")
        return None if found is None else str(found)

    def set_mark(self, mark: str) -> None:
        """Keep a sign by which the record that the index was made level with is known again."""
        with locked(self._folder / _LOCK, wait=True):
            state, _ = self._begin()
            state["mark"] = mark
            self._commit(state)

    def comparison(self) -> Comparison:
        """Return what compares this generation with the record."""
        return Comparison(self._parts())

    def _parts(self) -> tuple[Part, ...]:
        return self._newest()[1]

    def _newest(self) -> tuple[dict[str, Any], tuple[Part, ...]]:
        """Return the newest generation's small file, and its segments."""
        with self._lock:
            for _ in range(_ATTEMPTS):
                stamp = self._stamp()
                if self._state is not None and self._state[0] == stamp:
                    return self._state[1:]
                try:
                    state = _read(self._folder)
                    parts = tuple(self._part(entry, self._state) for entry in state["segments"])
                except StoreError:
                    # A writer may have put another generation in place, and taken files away.
                    if self._stamp() == stamp:
                        raise
                    continue
                if self._stamp() == stamp:
                    self._state = (stamp, state, parts)
                    return state, parts
        raise StoreError(f"{self._folder} changes faster than it can be read; try again")

    def _stamp(self) -> tuple[int, int]:
        try:
            found = (self._folder / INDEX).stat()
        except OSError as error:
            raise StoreError(
                f"{self._folder / INDEX}: {error.strerror}; build the index first"
            ) from error
        return found.st_ino, found.st_mtime_ns

    def _part(self, entry: dict[str, Any], before: Any) -> Part:
        """Open a segment, or take it from the generation before."""
        folder = self._folder / _SEGMENTS / entry["name"]
        segment = None
        for part in before[2] if before else ():
            if part.segment.folder == folder:
                segment = part.segment
        segment = segment or Segment(folder)
        return Part(segment, self._alive(segment, entry))

    def _alive(self, segment: Segment, entry: dict[str, Any]) -> npt.NDArray[np.uint8] | None:
        if entry["alive"] is None:
            return None
        path = self._folder / _SEGMENTS / entry["alive"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; build the index anew") from error
        if hashlib.sha256(data).hexdigest() != entry["sha256"] or len(data) * 8 < segment.rows:
            # To go on would bring back series that were withdrawn.
            raise StoreError(f"{path} is damaged; build the index anew")
        return np.frombuffer(data, np.uint8)

    def add_segment(
        self,
        batches: Iterable[pa.RecordBatch | Sequence[Series]],
        *,
        progress: Progress | None = None,
    ) -> int:
        """Add rows; series that are there already are replaced. Return how many came.

        Raises
        ------
        StoreError
            Rows are not as expected, or cannot be written. The index is as before.
        """
        with self._building() as folder:
            rows = build_segment(folder, batches, progress=progress)
            with locked(self._folder / _LOCK, wait=True):
                state, parts = self._begin()
                new, segment = self._place(state, folder)
                keys, plain = segment.series.contents()
                for entry, part in zip(state["segments"], parts, strict=True):
                    found = part.segment.series.find_keys(keys, plain)
                    self._clear(state, entry, part, found[found >= 0])
                state["segments"].append(new)
                self._commit(state)
        return rows

    def withdraw(self, series: Iterable[str]) -> int:
        """Take series out, at once; return how many were there.

        What they were stays in the segments' files until :meth:`compact`.
        """
        wanted = sorted(set(series))
        gone = 0
        with locked(self._folder / _LOCK, wait=True):
            state, parts = self._begin()
            for entry, part in zip(state["segments"], parts, strict=True):
                found = part.segment.series.find(wanted)
                gone += self._clear(state, entry, part, found[found >= 0])
            if gone:
                self._commit(state)
        return gone

    def compact(self, most_rows: int | None = None, *, progress: Progress | None = None) -> int:
        """Make one segment of several, without what was withdrawn; return its rows.

        Searches go on meanwhile, and see either the old segments or the new one.

        Parameters
        ----------
        most_rows : int, optional
            Only of segments that are not larger; of all by default.
        """
        with self._building() as folder:
            taken = [
                part
                for part in self._parts()
                if most_rows is None or part.segment.rows <= most_rows
            ]
            if not taken or (len(taken) == 1 and taken[0].alive is None):
                return sum(part.segment.rows for part in taken)
            rows = build_segment(
                folder, _Some(tuple(taken)).arrow(permission=TRUE), progress=progress
            )
            with locked(self._folder / _LOCK, wait=True):
                state, parts = self._begin()
                new, segment = self._place(state, folder)
                before = {part.segment.folder: part for part in taken}
                kept = []
                for entry, part in zip(state["segments"], parts, strict=True):
                    if part.segment.folder not in before:
                        kept.append(entry)
                        continue
                    # What was withdrawn while this was built.
                    gone = np.flatnonzero(before[part.segment.folder].bits() & ~part.bits())
                    rows -= self._clear(
                        state,
                        new,
                        Part(segment, self._alive(segment, new)),
                        segment.series.find(part.segment.series.texts(gone)),
                    )
                state["segments"] = [*kept, new]
                self._commit(state)
        return rows

    def warm(self) -> None:
        """Read the index once, so that the system has it in its cache; for a service's start.

        It takes as long as the disk needs; searches can go on meanwhile. A look-up of one series
        touches a page of each column: below a millisecond in memory, ten or more from a disk.
        """
        for part in self._parts():
            part.segment.warm()

    def names(self) -> list[str]:
        """Return the names of the segments, sorted."""
        return sorted(part.segment.folder.name for part in self._parts())

    def verify(
        self, names: Collection[str], take: Callable[[int], None] = lambda _count: None
    ) -> list[Path]:
        """Return the arrays of some segments that are wrong; see :meth:`Segment.verify`."""
        return [
            part.segment.folder / name
            for part in self._parts()
            if part.segment.folder.name in names
            for name in part.segment.verify(take)
        ]

    def contents(self, names: Collection[str]) -> Iterator[list[str]]:
        """Yield the series of some segments, without those withdrawn, some at a time."""
        for part in self._parts():
            if part.segment.folder.name in names:
                yield from part.segment.contents(part.bits())

    @contextmanager
    def _building(self) -> Iterator[Path]:
        """Give a place for a new segment. One is built at a time, while series are withdrawn."""
        with locked(self._folder / f"{_LOCK}-build", wait=True):
            folder = self._folder / _BUILDING
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o750)
            try:
                yield folder / "segment"
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _place(self, state: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Segment]:
        """Bring a new segment to where it stays; return its entry."""
        name = f"{state['next']:06d}"
        there = self._folder / _SEGMENTS / name
        folder.rename(there)
        sync_folder(there.parent)
        return {"name": name, "alive": None, "sha256": None}, Segment(there)

    def _begin(self) -> tuple[dict[str, Any], tuple[Part, ...]]:
        """Take what an interrupted writer left away; return the state to be changed."""
        state, parts = self._newest()
        self._sweep(state)
        return copy.deepcopy(state), parts

    def _clear(
        self, state: dict[str, Any], entry: dict[str, Any], part: Part, rows: npt.NDArray[Any]
    ) -> int:
        """Write a segment's bits anew without some rows; return how many were there."""
        bits = part.bits()
        gone = int(bits[rows].sum())
        if gone:
            bits[rows] = False
            data = np.packbits(bits, bitorder="little").tobytes()
            entry["alive"] = f"{entry['name']}.alive-{state['next']:06d}"
            entry["sha256"] = hashlib.sha256(data).hexdigest()
            with replacing(self._folder / _SEGMENTS / entry["alive"]) as file:
                file.write(data)
        return gone

    def _commit(self, state: dict[str, Any]) -> None:
        state["generation"] += 1
        state["next"] += 1
        _write(self._folder, state)
        self._parts()
        self._sweep(state)

    def _sweep(self, state: dict[str, Any]) -> None:
        """Take away what the newest generation does not name; who has it open keeps it."""
        kept = {entry["name"] for entry in state["segments"]}
        kept |= {entry["alive"] for entry in state["segments"]}
        for path in (self._folder / _SEGMENTS).iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Some(Searches):
    """Some segments of an index."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self._some = parts

    def _parts(self) -> tuple[Part, ...]:
        return self._some


def _write(folder: Path, state: dict[str, Any]) -> None:
    with replacing(folder / INDEX) as file:
        file.write(json.dumps(state, indent=1).encode())


def _read(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
        if state["version"] != VERSION:
            raise StoreError(f"{folder} is of version {state['version']}, expected {VERSION}")
        names = [entry["name"] + str(entry["alive"]) for entry in state["segments"]]
        if any("/" in name for name in names) or state["next"] < 1 or state["generation"] < 0:
            raise StoreError(f"{folder / INDEX} is not as expected; build the index anew")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / INDEX} cannot be read ({error}); build it anew") from error
    return state
