"""The verified reader: ranges of files, each block checked before anyone sees a byte of it.

A file's list of block hashes is checked against the manifest, each block against that list. What
has been read stays in a small cache in memory, and a file that is read in sequence is read
ahead. Nothing is ever written to a disk.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Self

from kakehashi.errors import BlockMismatchError, LinkError
from kakehashi.link.bulk import AHEAD_BYTES, Alarm, AsyncBulk, Bulk, Wanted
from kakehashi.link.figures import Pulse, ReplicaStats, Second, Stats
from kakehashi.link.locks import Event
from kakehashi.link.manifest import Connect, Entry, Manifest, remote_path
from kakehashi.link.pool import REREADS, Piece, Pool
from kakehashi.link.sftp import PATIENCE_S

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["CACHE_BYTES", "File", "Reader", "ReplicaStats", "Second", "Stats"]

HASH_BYTES = 32
CACHE_BYTES = 64 << 20

CHANNELS = 16
"""Channels at most; how many there are follows from what they carry."""

_OUT_OF_ORDER = 4
# One read, or a few side by side, is a slice or a box of a packed series, and what follows in the
# file is of no use to it: only who has read on for longer is likely to go on.
_RUN = 8
_REACH = 4
# What was not read on for so long does not count any more; with very many, each still gets some.
_RUN_S = 2.0
_LEAST_AHEAD = 8
_HASH_LISTS_BYTES = 32 << 20
# A read of more blocks goes straight to its place, unless it was read ahead.
_CACHED_READ = 8
_HASHES_AT_ONCE = 131072
# Blocks of a file that is small.
_SMALL = 4
_LOOK_S = 0.2


_Key = tuple[str, int]
Interrupted = Callable[[], bool]


def _abandon(pool: Pool, pid: int) -> None:
    # In a forked process that ends, the sockets are those of its parent, which goes on.
    if os.getpid() == pid:
        pool.abandon()


class Reader:
    """Reads the files of a manifest through several channels.

    Parameters
    ----------
    connect : callable or sequence of callable
        Opens a channel: returns a connected stream socket with an SFTP server behind it. It is
        called from several threads, again after a channel was lost, and for as long as it fails
        with ``OSError`` or ``LinkError``; ``LinkClosedError`` closes the reader. Several are
        endpoints with the same files: they are used side by side, and one that is out of reach
        or gives wrong bytes leaves the work to the others.
    manifest : Manifest
        What may be read.
    manifest_path : str
        Path of the manifest at the store; files lie beside it.
    channels : int
        Channels at most. They are opened when they are needed, as many as bring more bytes a
        second; one that the session refuses is done without.
    cache_bytes : int
        Bound of the cache in bytes.
    patience_s : float
        Longest silence in seconds after which a channel that owes answers is replaced; it
        begins with less.
    """

    def __init__(
        self,
        connect: Connect | Sequence[Connect],
        manifest: Manifest,
        *,
        manifest_path: str = "/manifest.json",
        channels: int = CHANNELS,
        cache_bytes: int = CACHE_BYTES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.manifest = manifest
        self._manifest_path = manifest_path
        connects = [connect] if callable(connect) else list(connect)
        self._pool = Pool(connects, channels=channels, patience_s=patience_s)
        self._block_size = manifest.block_size
        self._cache_blocks = max(1, cache_bytes // manifest.block_size)
        self._window = max(1, self._cache_blocks // 2)
        self._lock = threading.Lock()
        self._blocks: OrderedDict[_Key, Piece] = OrderedDict()
        self._hashes: OrderedDict[str, bytes] = OrderedDict()
        self._hashes_bytes = 0
        # Files that are read in sequence, and when they were last; the oldest stands first.
        self._runs: OrderedDict[str, float] = OrderedDict()
        self._cached_blocks = 0
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _abandon, self._pool, self._pid)

    def __repr__(self) -> str:
        return (
            f"<Reader of {len(self.manifest.files)} files of project {self.manifest.project!r}, "
            f"{'open' if self._finalizer.alive else 'closed'}>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @classmethod
    def connect(
        cls,
        connect: Connect | Sequence[Connect],
        *,
        manifest_path: str,
        sha256: str,
        channels: int = CHANNELS,
    ) -> Self:
        """Fetch and check the manifest, then return a reader of it.

        Parameters
        ----------
        connect : callable or sequence of callable
            As for the class.
        manifest_path, sha256 : str
            Where the manifest lies at the store, and its hash; both stand in the grant.
        channels : int
            As for the class.

        Raises
        ------
        BlockMismatchError, LinkError
            As for :meth:`Manifest.fetch`.
        """
        manifest = Manifest.fetch(connect, manifest_path, sha256)
        return cls(connect, manifest, manifest_path=manifest_path, channels=channels)

    def close(self) -> None:
        """Close every channel; reads under way end with ``LinkClosedError``."""
        # In a forked process, the sockets are those of its parent, which goes on.
        if self._finalizer.detach() is not None and os.getpid() == self._pid:
            self._pool.close()
        with self._lock:
            self._blocks.clear()
            self._hashes.clear()
            self._hashes_bytes = 0

    def stats(self) -> Stats:
        """Return the figures so far; cheap, from any thread."""
        self.refuse_forked()
        with self._lock:
            cached_blocks = self._cached_blocks
        return self._pool.stats(cached_blocks)

    def history(self) -> tuple[Second, ...]:
        """Return what was done second by second, oldest first, within the last hour."""
        self.refuse_forked()
        return self._pool.history()

    @property
    def pulse(self) -> Callable[[int], Pulse]:
        """What tells, from some second on, what was done; it does not keep the reader."""
        return self._pool.pulse

    def read_many(self, wanted: Iterable[Wanted], *, ahead_bytes: int = AHEAD_BYTES) -> Bulk:
        """Read many files, or ranges of them, as one continuous stream.

        Parameters
        ----------
        wanted : iterable of str or tuple
            Paths as in the manifest, or tuples of path, offset and length. May be endless; it
            is asked for more in the thread that iterates.
        ahead_bytes : int
            Bound in bytes on what is under way or waits to be handed over, besides the range
            that is next. Nothing more is asked for while it is reached.

        Returns
        -------
        Bulk
            An iterator of read-only ``memoryview``, one for each range, in their order.

        Examples
        --------
        >>> for data in reader.read_many(reader.manifest.files):  # doctest: +SKIP
        ...     consume(data)
        """
        self.refuse_forked()
        return Bulk(self, wanted, ahead_bytes=ahead_bytes)

    def aread_many(self, wanted: Iterable[Wanted], *, ahead_bytes: int = AHEAD_BYTES) -> AsyncBulk:
        """Do as :meth:`read_many`, for ``async for``."""
        return AsyncBulk(self.read_many(wanted, ahead_bytes=ahead_bytes))

    def open(self, path: str, *, interrupted: Interrupted | None = None) -> File:
        """Open a file of the manifest; reads and checks its list of block hashes.

        Parameters
        ----------
        path : str
            As in the manifest, ``series/UID.ozx``.
        interrupted : callable, optional
            Asked now and then while this waits; true ends it with ``InterruptedError``.

        Raises
        ------
        NotInManifestError
            The manifest has no such path.
        BlockMismatchError
            The list of hashes is not the one that the manifest names.
        LinkClosedError
            The link is closed.
        """
        entry = self.manifest.entry(path)
        event = Event()
        found: list[bytes | LinkError] = []

        def tell(hashes: bytes | LinkError) -> None:
            found.append(hashes)
            event.set()

        self._ask_open(entry, tell)
        self._wait(event, interrupted)
        return self._opened(entry, found[0])

    async def aopen(self, path: str) -> File:
        """Do as :meth:`open`, without holding up the event loop."""
        entry = self.manifest.entry(path)
        alarm = Alarm()
        found: list[bytes | LinkError] = []

        def tell(hashes: bytes | LinkError) -> None:
            found.append(hashes)
            alarm()

        self._ask_open(entry, tell)
        await alarm.wait()
        return self._opened(entry, found[0])

    def _opened(self, entry: Entry, hashes: bytes | LinkError) -> File:
        if isinstance(hashes, LinkError):
            raise hashes
        return File(self, entry, hashes)

    def _ask_open(self, entry: Entry, tell: Callable[[bytes | LinkError], None]) -> None:
        """Do as :meth:`_ask_list`; of a small file the first block comes at the same time.

        It will be asked for next, and two round trips are most of what a small file takes. A
        single block is checked by the manifest itself, without a list.
        """
        self.refuse_forked()
        count = -(-entry.size // self._block_size)
        if not 0 < count <= _SMALL or self._known_list(entry) is not None:
            self._ask_list(entry, tell)
            return
        path = remote_path(self._manifest_path, entry.path)
        first = Piece(path, 0, min(self._block_size, entry.size), None, hashed=True)
        lists: list[bytes | LinkError] = []
        left = 1 if count == 1 else 2

        def came() -> None:
            nonlocal left
            with self._lock:
                left -= 1
                if left:
                    return
            found = first.found or b""
            if lists:
                hashes = lists[0]
            elif hashlib.sha256(found).hexdigest() == entry.blocks:
                hashes = found
                self._keep_list(entry, hashes)
            else:
                # It may be read rightly elsewhere, which takes its hash.
                self._ask_list(entry, tell)
                return
            if isinstance(hashes, bytes) and hashes[:HASH_BYTES] == found:
                with self._lock:
                    self._blocks.setdefault((entry.path, 0), first)
                    self._trim()
            tell(hashes)

        def listed(hashes: bytes | LinkError) -> None:
            lists.append(hashes)
            came()

        first._waiters.append(lambda _: came())
        self._submit([first], urgent=True)
        if count > 1:
            self._ask_list(entry, listed)

    def _ask_list(
        self,
        entry: Entry,
        tell: Callable[[bytes | LinkError], None],
        tries: int = 1 + REREADS,
    ) -> None:
        """Fetch and check a file's list of block hashes; ``tell`` gets it, or why not.

        It is called from whichever thread, at once where the list is known.
        """
        self.refuse_forked()
        known = self._known_list(entry)
        if known is not None:
            tell(known)
            return
        size = -(-entry.size // self._block_size) * HASH_BYTES
        path = remote_path(self._manifest_path, entry.blocks_path)
        # One piece can be checked, and read again elsewhere, by itself.
        digest = bytes.fromhex(entry.blocks) if size <= _HASHES_AT_ONCE else None
        pieces = [
            Piece(path, at, min(_HASHES_AT_ONCE, size - at), digest)
            for at in range(0, size, _HASHES_AT_ONCE)
        ]
        left = len(pieces)

        def came(_: Piece) -> None:
            nonlocal left
            with self._lock:
                left -= 1
                if left:
                    return
            error = next((piece.error for piece in pieces if piece.error is not None), None)
            hashes = b"".join(piece.data for piece in pieces if piece.data is not None)
            if error is not None and not isinstance(error, BlockMismatchError):
                tell(error)
            elif error is None and hashlib.sha256(hashes).hexdigest() == entry.blocks:
                self._keep_list(entry, hashes)
                tell(hashes)
            elif error is None and tries > 1:
                self._ask_list(entry, tell, tries - 1)
            else:
                tell(
                    BlockMismatchError(
                        f"{entry.blocks_path}: the list of block hashes is not the one that the "
                        "manifest names; it was changed or damaged at the store, tell the "
                        "store's operators"
                    )
                )

        for piece in pieces:
            piece._waiters.append(came)
        if pieces:
            self._submit(pieces, urgent=True)
        else:
            tell(b"")

    def _known_list(self, entry: Entry) -> bytes | None:
        with self._lock:
            known = self._hashes.get(entry.path)
            if known is not None:
                self._hashes.move_to_end(entry.path)
            return known

    def _keep_list(self, entry: Entry, hashes: bytes) -> None:
        with self._lock:
            self._hashes_bytes += len(hashes) - len(self._hashes.get(entry.path, b""))
            self._hashes[entry.path] = hashes
            while self._hashes_bytes > _HASH_LISTS_BYTES and len(self._hashes) > 1:
                self._hashes_bytes -= len(self._hashes.popitem(last=False)[1])

    def _submit(self, pieces: Sequence[Piece], *, urgent: bool) -> None:
        self._pool.submit(pieces, urgent=urgent)

    def refuse_forked(self) -> None:
        """Raise a ``LinkError`` in a process that was forked behind this reader's opening.

        The channels' threads do not live on in a child, so it would wait for ever: for them, or
        for a lock that one of them held.
        """
        if os.getpid() != self._pid:
            raise LinkError(
                "this reader was opened before the process was forked and cannot be used here; "
                "open a Store() of your own in each worker process"
            )

    def _claim(self, file: File, indices: range, *, urgent: bool) -> list[Piece]:
        """Return these blocks, from the cache, on their way, or asked for now."""
        claimed: list[Piece] = []
        fresh: list[Piece] = []
        with self._lock:
            if not urgent and 2 * len(self._blocks) >= 3 * self._cache_blocks:
                # Many files are read ahead at once, and the link does not keep up.
                return claimed
            for index in indices:
                key = (file.path, index)
                piece = self._blocks.get(key)
                if piece is None or piece.error is not None:
                    piece = file._piece(index)
                    self._blocks[key] = piece
                    fresh.append(piece)
                else:
                    self._blocks.move_to_end(key)
                    self._cached_blocks += urgent
                    if urgent and not piece.done:
                        # It may wait among those read ahead; now somebody needs it.
                        fresh.append(piece)
                claimed.append(piece)
            self._trim()
        if fresh:
            self._submit(fresh, urgent=urgent)
        return claimed

    def _trim(self) -> None:
        surplus = len(self._blocks) - self._cache_blocks
        if surplus > 0:
            # What is on its way stays: it is bounded by the windows of those who read.
            oldest = (key for key, piece in self._blocks.items() if piece.done)
            for key in list(itertools.islice(oldest, surplus)):
                del self._blocks[key]

    def _goes_on(self, path: str, first: int) -> int:
        """Note that a file is read in sequence; return how many blocks ahead it may be read.

        The cache has room for one window: several files at once would push one another's blocks
        out before they are read, so they share it, and what was read goes first.
        """
        now = time.monotonic()
        with self._lock:
            for index in range(max(0, first - _CACHED_READ), first):
                if (path, index) in self._blocks:
                    self._blocks.move_to_end((path, index), last=False)
            self._runs[path] = now
            self._runs.move_to_end(path)
            while now - next(iter(self._runs.values())) > _RUN_S:
                self._runs.popitem(last=False)
            return min(self._window, max(_LEAST_AHEAD, self._window // len(self._runs)))

    def _ends(self, path: str) -> None:
        """Note that a file is not read on in sequence."""
        with self._lock:
            self._runs.pop(path, None)

    def _has(self, path: str, index: int) -> bool:
        """Tell whether a block is in the cache, or on its way to it."""
        with self._lock:
            piece = self._blocks.get((path, index))
            return piece is not None and piece.error is None

    def _wait(self, event: Event, interrupted: Interrupted | None) -> None:
        if event.is_set():
            return
        started = time.monotonic()
        try:
            while not event.wait(_LOOK_S if interrupted else None):
                if interrupted is not None and interrupted():
                    raise InterruptedError(errno.EINTR, "the read was interrupted")
        finally:
            self._pool.waited(time.monotonic() - started)

    def _await(self, piece: Piece, interrupted: Interrupted | None) -> bytearray | memoryview:
        if not piece.done:
            event = Event()
            self._pool.when_done(piece, lambda _: event.set())
            self._wait(event, interrupted)
        return _data(piece)


def _data(piece: Piece) -> bytearray | memoryview:
    if piece.data is None:
        error = piece.error or LinkError("the piece has neither data nor error")
        raise type(error)(*error.args)
    return piece.data


class File:
    """An open file of the manifest; made by :meth:`Reader.open`, safe to share by threads.

    Attributes
    ----------
    path : str
        As in the manifest.
    size : int
        Bytes.
    """

    def __init__(self, reader: Reader, entry: Entry, hashes: bytes) -> None:
        self.path = entry.path
        self.size = entry.size
        self._reader: Reader | None = reader
        self._hashes = hashes
        self._block_size = reader.manifest.block_size
        self._blocks = -(-entry.size // self._block_size)
        self._remote = remote_path(reader._manifest_path, entry.path)
        self._lock = threading.Lock()
        self._expected = -_OUT_OF_ORDER - 1
        self._run = 0
        self._ahead_until = 0

    def __repr__(self) -> str:
        return f"<File {self.path}, {self.size} bytes>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the reader; reading is an error from now on."""
        reader, self._reader = self._reader, None
        if reader is not None and os.getpid() == reader._pid:
            reader._ends(self.path)

    def read(self, offset: int, length: int, *, interrupted: Interrupted | None = None) -> bytes:
        """Return verified bytes.

        Parameters
        ----------
        offset, length : int
            The range in bytes; what lies behind the file's end is left out.
        interrupted : callable, optional
            As for :meth:`Reader.open`.

        Returns
        -------
        bytes
            ``length`` bytes, fewer only at the end of the file.

        Raises
        ------
        BlockMismatchError
            The bytes are not those that the manifest names, also when read again.
        LinkClosedError
            The link is closed.
        LinkError
            The store refuses to give the bytes.
        """
        reader, end = self._range(offset, length)
        if offset >= end:
            return b""
        block = self._block_size
        first, stop = offset // block, -(-end // block)
        ahead = self._plan(first, stop, reader)
        if stop - first > _CACHED_READ and not reader._has(self.path, first):
            return self._read_directly(reader, offset, end, ahead, interrupted)
        out = io.BytesIO()
        flying: deque[Piece] = deque()
        claimed = first
        for index in range(first, stop):
            if claimed < stop and len(flying) <= reader._window // 2:
                until = min(stop, claimed + reader._window - len(flying))
                flying.extend(reader._claim(self, range(claimed, until), urgent=True))
                claimed = until
                if claimed == stop and ahead:
                    reader._claim(self, ahead, urgent=False)
            data = memoryview(reader._await(flying.popleft(), interrupted))
            at = index * block
            out.write(data[max(offset - at, 0) : end - at])
        return out.getvalue()

    async def aread(self, offset: int, length: int) -> bytes:
        """Do as :meth:`read`, without holding up the event loop.

        A read that is cancelled frees its memory; blocks that are on their way to the cache
        stay there.
        """
        reader, end = self._range(offset, length)
        if offset >= end:
            return b""
        block = self._block_size
        first, stop = offset // block, -(-end // block)
        ahead = self._plan(first, stop, reader)
        if stop - first > _CACHED_READ and not reader._has(self.path, first):
            out = io.BytesIO()
            bulk = Bulk(reader, [(self.path, offset, end - offset)], allocate=_Into(out))
            async with AsyncBulk(bulk) as ranges:
                reader._claim(self, ahead, urgent=False)
                async for _ in ranges:
                    pass
            return out.getvalue()
        pieces = reader._claim(self, range(first, stop), urgent=True)
        reader._claim(self, ahead, urgent=False)
        parts: list[memoryview] = []
        for index, piece in enumerate(pieces, first):
            if not piece.done:
                alarm = Alarm()
                started = time.monotonic()
                reader._pool.when_done(piece, alarm)
                await alarm.wait()
                reader._pool.waited(time.monotonic() - started)
            at = index * block
            parts.append(memoryview(_data(piece))[max(offset - at, 0) : end - at])
        return b"".join(parts)

    def _range(self, offset: int, length: int) -> tuple[Reader, int]:
        if self._reader is None:
            raise ValueError(f"{self.path} is closed; open it again")
        if offset < 0 or length < 0:
            raise ValueError(f"offset and length must not be negative: {offset}, {length}")
        self._reader.refuse_forked()
        return self._reader, min(offset + length, self.size)

    def _read_directly(
        self,
        reader: Reader,
        offset: int,
        end: int,
        ahead: range,
        interrupted: Interrupted | None,
    ) -> bytes:
        """Read blocks to the place where they are handed out, past the cache."""
        out = io.BytesIO()
        event = Event()
        wanted = [(self.path, offset, end - offset)]
        with Bulk(reader, wanted, allocate=_Into(out)) as ranges:
            ready = ranges.advance(event.set)
            reader._claim(self, ahead, urgent=False)
            while not ready:
                reader._wait(event, interrupted)
                event.clear()
                ready = ranges.advance(event.set)
            ranges.take()
        return out.getvalue()

    def _piece(self, index: int) -> Piece:
        at = index * self._block_size
        digest = self._hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
        return Piece(self._remote, at, min(self._block_size, self.size - at), digest)

    def _plan(self, first: int, stop: int, reader: Reader) -> range:
        """Return the blocks to read ahead: none at first, more the longer the run."""
        with self._lock:
            # Several threads that share a sequence come in slightly out of order.
            if abs(first - self._expected) <= _OUT_OF_ORDER:
                self._run += max(0, stop - self._expected)
                self._expected = max(self._expected, stop)
            else:
                self._run = 0
                self._expected = stop
                self._ahead_until = 0
            if self._run < _RUN:
                return range(0)
            if stop == self._blocks:
                # The others may read on without regard to it.
                reader._ends(self.path)
                return range(0)
            reach = min(reader._goes_on(self.path, first), _REACH * self._run)
            begin = max(stop, self._ahead_until)
            if begin - stop > reach // 2:
                return range(0)
            self._ahead_until = min(stop + reach, self._blocks)
            return range(begin, self._ahead_until)


class _Into:
    """Gives the memory of a ``BytesIO``, which hands it out as ``bytes`` without a copy."""

    def __init__(self, out: io.BytesIO) -> None:
        self._out = out

    def __call__(self, length: int) -> memoryview:
        self._out.seek(length - 1)
        self._out.write(b"\0")
        return self._out.getbuffer()
