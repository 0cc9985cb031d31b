"""Figures of a session's processes, by the second and by the minute, in memory they share.

Each process writes a file of its own in the session's private runtime folder, which is memory of
the node: two rings of fixed size, one of the last hour's seconds and one of the last week's
minutes. Any process of the session reads them all. What a process has written stays when it is
killed; its file is folded into one for all that have ended when the next process begins. There are
counts in it and nothing else: no names, no bytes of images.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

SECOND, MINUTE = 1, 60
# Length of a slot in seconds, and how many there are.
_RINGS = ((SECOND, 3600), (MINUTE, 7 * 24 * 60))
# In the machine's own order, so that each number is written at once: others read meanwhile.
SLOT = struct.Struct("@QQIIIIffffQ")
"""A :class:`Moment`'s fields, and its time again, which tells that all between is of that time."""
VIEW_NAME = ".traffic"
"""File of the mounted view in which its process shows its own; it is not listed."""

_HEAD = b"kakehashi traffic 1".ljust(64)
_SIZE = len(_HEAD) + SLOT.size * sum(count for _, count in _RINGS)
_FOLDER = "kakehashi-traffic"
_LIVE, _ENDED, _LOCK = ".live", "ended", "lock"


@dataclass(frozen=True, slots=True)
class Moment:
    """What happened in one second, or one minute.

    Attributes
    ----------
    at : int
        Its beginning, seconds since 1970.
    bytes : int
        Verified bytes that were read from the store.
    rereads, reconnects : int
        Pieces read again because they came wrong; channels lost or not opened.
    steps : int
        Batches that training loops were given.
    channels : int
        Channels at most.
    asked_s : float
        Seconds in which bytes were asked for.
    stalled_s : float
        Whole seconds of those in which none came.
    waited_s : float
        Seconds that loops waited for batches, summed over loops.
    rtt_s : float
        Shortest round trip known at the time; 0 if none.
    """

    at: int
    bytes: int = 0
    rereads: int = 0
    reconnects: int = 0
    steps: int = 0
    channels: int = 0
    asked_s: float = 0.0
    stalled_s: float = 0.0
    waited_s: float = 0.0
    rtt_s: float = 0.0

    def then(self, later: Moment) -> Moment:
        """Return both together: the same process, later in the same time."""
        both = self._sum(later)
        return replace(
            both,
            channels=max(self.channels, later.channels),
            asked_s=self.asked_s + later.asked_s,
            stalled_s=self.stalled_s + later.stalled_s,
        )

    def beside(self, other: Moment) -> Moment:
        """Return both together: another process, at the same time."""
        stalled = [one.stalled_s for one in (self, other) if one.asked_s]
        return replace(
            self._sum(other),
            channels=self.channels + other.channels,
            asked_s=max(self.asked_s, other.asked_s),
            # Bytes for one of them have come over the line, so it was not dead.
            stalled_s=min(stalled, default=0.0),
        )

    def _sum(self, other: Moment) -> Moment:
        known = [one.rtt_s for one in (self, other) if one.rtt_s]
        return replace(
            self,
            bytes=self.bytes + other.bytes,
            rereads=self.rereads + other.rereads,
            reconnects=self.reconnects + other.reconnects,
            steps=self.steps + other.steps,
            waited_s=self.waited_s + other.waited_s,
            rtt_s=min(known, default=0.0),
        )


class Tally:
    """Two rings in some memory; one process writes, others read.

    Parameters
    ----------
    memory : mmap, optional
        Memory of the right size; by default memory of this process alone.
    file : int, optional
        The locked descriptor of the file under it.
    """

    def __init__(self, memory: mmap.mmap | None = None, file: int | None = None) -> None:
        if memory is None:
            memory = mmap.mmap(-1, _SIZE)
            memory[: len(_HEAD)] = _HEAD
        self._memory = memory
        self._file = file

    @classmethod
    def of(cls, raw: bytes) -> Self | None:
        """Return the tally that another process's :meth:`raw` gave, None if it is none."""
        if len(raw) != _SIZE or not raw.startswith(_HEAD):
            return None
        copy = cls()
        copy._memory[:] = raw
        return copy

    def raw(self, offset: int = 0, size: int = _SIZE) -> bytes:
        """Return a copy of a part of it, for a process that cannot map it."""
        return self._memory[offset : offset + size]

    @classmethod
    def map(cls, file: int, *, writable: bool) -> Self | None:
        """Return the tally in a file, None if there is none in it."""
        if os.fstat(file).st_size != _SIZE:
            return None
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        memory = mmap.mmap(file, _SIZE, access=access)
        if memory[: len(_HEAD)] != _HEAD:
            memory.close()
            return None
        return cls(memory, file)

    @property
    def shared(self) -> bool:
        """Whether other processes can read it."""
        return self._file is not None

    def close(self) -> None:
        """Unmap it, and let go of the file."""
        self._memory.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def add(self, moment: Moment) -> None:
        """Add to what was noted for the second, and for its minute."""
        for step, _ in _RINGS:
            self._put(replace(moment, at=moment.at - moment.at % step), step, beside=False)

    def fold(self, other: Tally) -> None:
        """Add all that another process has noted."""
        for step, _ in _RINGS:
            for moment in other.read(step):
                self._put(moment, step, beside=True)

    def second(self, at: int) -> Moment:
        """Return what was noted for one second."""
        start, count = _ring(SECOND)
        *fields, _ = SLOT.unpack_from(self._memory, start + at % count * SLOT.size)
        found = Moment(*fields)
        return found if found.at == at else Moment(at)

    def read(self, step: int, since: int = 0) -> Iterator[Moment]:
        """Return the moments of one ring from some time on, in no order."""
        for *values, again in SLOT.iter_unpack(self.slots(step)):
            # What is being written just now comes with the next look.
            if values[0] == again >= max(since, 1):
                yield Moment(*values)

    def slots(self, step: int) -> bytes:
        """Return a copy of one ring, each slot as :data:`SLOT` has it."""
        start, count = _ring(step)
        return self._memory[start : start + count * SLOT.size]

    def _put(self, moment: Moment, step: int, *, beside: bool) -> None:
        start, count = _ring(step)
        place = start + moment.at // step % count * SLOT.size
        *fields, _ = SLOT.unpack_from(self._memory, place)
        before = Moment(*fields)
        if before.at > moment.at:
            return
        if before.at == moment.at:
            moment = before.beside(moment) if beside else before.then(moment)
        SLOT.pack_into(
            self._memory,
            place,
            moment.at,
            moment.bytes,
            moment.rereads,
            moment.reconnects,
            moment.steps,
            moment.channels,
            moment.asked_s,
            moment.stalled_s,
            moment.waited_s,
            moment.rtt_s,
            moment.at,
        )


def _ring(step: int) -> tuple[int, int]:
    start = len(_HEAD)
    for length, count in _RINGS:
        if length == step:
            return start, count
        start += count * SLOT.size
    raise ValueError(f"there is a ring of seconds and one of minutes, none of {step} s")


def span(step: int) -> int:
    """Return how many seconds back a ring goes; in its slots may stand what is older."""
    return step * _ring(step)[1]


def shared_folder(session: str) -> Path | None:
    """Return where the processes of a session keep their tallies.

    It is in the session's private runtime folder. Where the environment names none, as outside of
    a session, each process has its figures to itself.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime, _FOLDER, session) if runtime and Path(runtime).is_dir() else None


def begin(folder: Path | None) -> Tally:
    """Return this process's own tally, for as long as it lives.

    A folder that cannot be written costs the other processes the view of this one, not its work.
    """
    if folder is None:
        return Tally()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder, fcntl.LOCK_EX):
            _fold_ended(folder)
            return _create(folder / f"{os.getpid()}-{secrets.token_hex(4)}{_LIVE}")
    except OSError:
        return Tally()


@contextlib.contextmanager
def every(folder: Path) -> Iterator[list[Tally]]:
    """Give the tallies of all processes of a session, also of those that have ended."""
    tallies: list[Tally] = []
    if not folder.is_dir():
        yield tallies
        return
    with _locked(folder, fcntl.LOCK_SH), contextlib.ExitStack() as stack:
        for path in (*folder.glob(f"*{_LIVE}"), folder / _ENDED):
            with contextlib.suppress(FileNotFoundError):
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                tally = Tally.map(file, writable=False)
                if tally is None:
                    os.close(file)
                else:
                    stack.callback(tally.close)
                    tallies.append(tally)
        yield tallies


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, how)
        yield
    finally:
        os.close(lock)


def _create(path: Path) -> Tally:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Held for as long as the process lives: it says that the file has a writer.
        fcntl.flock(file, fcntl.LOCK_EX)
        # Taken now: with no room left, a later write to the mapped file would kill the process.
        os.posix_fallocate(file, 0, _SIZE)
        os.pwrite(file, _HEAD, 0)
        tally = Tally.map(file, writable=True)
    except BaseException:
        os.close(file)
        raise
    if tally is None:
        os.close(file)
        raise OSError(f"{path} does not keep what is written")
    return tally


def _fold_ended(folder: Path) -> None:
    """With the folder locked: keep one file for all processes that have ended."""
    for path in folder.glob(f"*{_LIVE}"):
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        gone = Tally.map(file, writable=False)
        if gone is None:
            os.close(file)
        else:
            with contextlib.closing(gone), contextlib.closing(_ended(folder)) as ended:
                ended.fold(gone)
        path.unlink()


def _ended(folder: Path) -> Tally:
    with contextlib.suppress(FileNotFoundError):
        file = os.open(folder / _ENDED, os.O_RDWR | os.O_CLOEXEC)
        tally = Tally.map(file, writable=True)
        if tally is not None:
            return tally
        os.close(file)
        (folder / _ENDED).unlink()
    return _create(folder / _ENDED)
