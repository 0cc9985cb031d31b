"""Packed files held in memory, once for all processes of a training, and let go of at once.

The memory is an anonymous file (``memfd_create``): it has no name anywhere, so nothing of it can
stay behind on a node, and it is gone with the last process that has it. Workers get it by
inheritance or, where they are spawned, by passing the descriptor; nothing is copied. It is filled
with checked bytes and then sealed: whoever has the descriptor can read it, and can drop it, but
cannot change a byte. It is never mapped, so that dropping it (cutting it to no length) frees the
memory under every process at once, and a read that comes later, or in the middle of that, finds
nothing rather than something else.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import threading
import weakref
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any

from kakehashi.errors import LinkClosedError, SessionError
from kakehashi.link.locks import Event
from kakehashi.link.manifest import series_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kakehashi.imaging.ozip import ByteReader
    from kakehashi.link.processstore import ProcessStore
    from kakehashi.link.session import Session

_WATCH_S = 2.0
# Besides what is held; the reader's own bound on what it has under way.
_AHEAD_BYTES = 16 << 20


class Held:
    """The bytes of packed files; may be pickled to processes that are being started.

    Parameters
    ----------
    places : Mapping of str to tuple
        For each series its first byte and its size in this memory.
    fd : int, optional
        The memory of another process's object; fresh memory if not given.
    """

    def __init__(self, places: Mapping[str, tuple[int, int]], fd: int | None = None) -> None:
        self.places = dict(places)
        if fd is None:
            fd = os.memfd_create("kakehashi-pinned", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fd = fd
        # Not closed before the last user has gone: its number would mean another file. At the
        # interpreter's end threads may still read.
        weakref.finalize(self, os.close, fd).atexit = False

    def __reduce__(self) -> Any:
        return _rebuilt, (self.places, DupFd(self._fd))

    def fill(self, uid: str, data: memoryview) -> None:
        """Put a series's file into its place."""
        at, _ = self.places[uid]
        while data:
            written = os.pwrite(self._fd, data, at)
            at, data = at + written, data[written:]

    def seal(self) -> None:
        """Let nobody change it any more; it can still be dropped."""
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)

    def drop(self) -> None:
        """Free the memory, in all processes."""
        os.ftruncate(self._fd, 0)

    def bytes_in_memory(self) -> int:
        """Return how much memory it takes now."""
        return os.fstat(self._fd).st_blocks * 512

    def read(self, uid: str, offset: int, length: int) -> bytes | None:
        """Return bytes of a series's file, or nothing if they are not (or no longer) held."""
        if uid not in self.places:
            return None
        first, size = self.places[uid]
        at, stop = first + offset, first + min(offset + length, size)
        parts: list[bytes] = []
        while at < stop:
            part = os.pread(self._fd, stop - at, at)
            if not part:
                return None
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _rebuilt(places: Mapping[str, tuple[int, int]], fd: Any) -> Held:
    return Held(places, fd.detach())


class HeldFile:
    """A packed file that is held: the store is asked only for what was dropped.

    Parameters
    ----------
    held : Held
    uid : str
    size : int
        Bytes of the file.
    otherwise : callable
        Opens the file at the store.
    """

    def __init__(
        self, held: Held, uid: str, size: int, otherwise: Callable[[], ByteReader]
    ) -> None:
        self.size = size
        self._held = held
        self._uid = uid
        self._otherwise = otherwise
        self._file: ByteReader | None = None

    def read(self, offset: int, length: int) -> bytes:
        """Return verified bytes."""
        data = self._held.read(self._uid, offset, length)
        if data is not None:
            return data
        if self._file is None:
            self._file = self._otherwise()
        return self._file.read(offset, length)


@dataclass(frozen=True)
class PinProgress:
    """How far pinning is.

    Attributes
    ----------
    series, bytes : int
        Held so far.
    all_series, all_bytes : int
        To be held.
    state : str
        ``pinning``, ``held``, ``dropped`` or ``failed``.
    """

    series: int
    bytes: int
    all_series: int
    all_bytes: int
    state: str

    def __str__(self) -> str:
        return (
            f"{self.state}: {self.series} of {self.all_series} series, "
            f"{self.bytes / 1e9:.2f} of {self.all_bytes / 1e9:.2f} GB"
        )


class Pins:
    """A share of the cohort on its way into memory, and then in it; made by ``pin``.

    It is dropped by :meth:`unpin`, at the end of the last process that has it, and when the
    session's lease says that the session is ending (or says nothing any more), as it does when
    the portal was not reached for the site's ``offline_max_hours``.

    Parameters
    ----------
    stores : ProcessStore
        Where it is read.
    uids : sequence of str
        What is pinned.
    progress : callable, optional
        Called after each series, in another thread.
    """

    def __init__(
        self,
        stores: ProcessStore,
        uids: Sequence[str],
        *,
        progress: Callable[[PinProgress], None] | None = None,
    ) -> None:
        stores.session.lease()  # who has none holds nothing
        files = stores.get().reader.manifest.files
        places: dict[str, tuple[int, int]] = {}
        at = 0
        for uid in uids:
            size = files[series_path(uid)].size
            places[uid] = at, size
            at += size
        self.held = Held(places)
        self._stores = stores
        self._tell = progress
        self._all_bytes = at
        self._lock = threading.Lock()
        self._series = self._bytes = 0
        self._state = "pinning"
        self._error: Exception | None = None
        self._wake = Event()
        self._thread = threading.Thread(target=self._run, name="pin", daemon=True)
        self._thread.start()
        # It is not this object that keeps the memory, but whoever reads from it.
        watched = weakref.ref(self), weakref.ref(self.held), stores.session
        threading.Thread(target=_watch, args=watched, name="pins", daemon=True).start()

    def __repr__(self) -> str:
        return f"<Pins, {self.progress()}>"

    def progress(self) -> PinProgress:
        """Return how far it is."""
        with self._lock:
            return PinProgress(
                self._series, self._bytes, len(self.held.places), self._all_bytes, self._state
            )

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until everything is held; return whether it is.

        Raises
        ------
        LinkError
            A series could not be read; nothing is held.
        LinkClosedError
            It was stopped or dropped.
        """
        self._thread.join(timeout_s)
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._state == "dropped":
                raise LinkClosedError("what was pinned is dropped; pin it anew if it is needed")
            return self._state == "held"

    def unpin(self) -> None:
        """Stop pinning, and free the memory in all processes; reads go to the store again."""
        with self._lock:
            if self._state != "failed":
                self._state = "dropped"
            self._series = self._bytes = 0
            # Under the lock, as filling is, so that nothing is put in behind this.
            self.held.drop()
        self._wake.set()

    def _run(self) -> None:
        try:
            self._pin()
        except Exception as error:  # raised in wait()
            with self._lock:
                if self._state != "dropped":
                    self._error, self._state = error, "failed"
            self.unpin()

    def _pin(self) -> None:
        with self._lock:
            # A rank may have nothing to hold.
            self._hold_if_whole()
        reader = self._stores.get().reader
        paths = (series_path(uid) for uid in self.held.places)
        with closing(reader.read_many(paths, ahead_bytes=_AHEAD_BYTES)) as ranges:
            for uid in self.held.places:
                while not ranges.advance(self._wake.set):
                    self._wake.wait()
                    self._wake.clear()
                    if self.progress().state != "pinning":
                        return
                data = ranges.take()
                with self._lock:
                    if self._state != "pinning":
                        return
                    self.held.fill(uid, data)
                    self._series += 1
                    self._bytes += len(data)
                    self._hold_if_whole()
                if self._tell is not None:
                    self._tell(self.progress())

    def _hold_if_whole(self) -> None:
        if self._state == "pinning" and self._series == len(self.held.places):
            self.held.seal()
            self._state = "held"


def _watch(pinned: weakref.ref[Pins], memory: weakref.ref[Held], session: Session) -> None:
    """Drop what is pinned when the session no longer has the right to it."""
    pause = threading.Event()
    while memory() is not None:
        pins = pinned()
        if pins is not None and pins.progress().state in ("dropped", "failed"):
            return
        if _over(session):
            held = memory()
            if pins is not None:
                pins.unpin()
            elif held is not None:
                held.drop()
            return
        del pins
        pause.wait(_WATCH_S)


def _over(session: Session) -> bool:
    """Tell whether a session has ended, or says nothing any more.

    That a certificate has lapsed is none of it: a session lives on while it is offline, for as
    long as its site allows. The wrapper knows how long that is, and then says that it is ending.
    """
    try:
        lease = session.lease()
    except SessionError:
        return True
    over = lease.state == "ending" or dt.datetime.now(dt.UTC) >= lease.ends_at
    return over or not session.source.exists()
