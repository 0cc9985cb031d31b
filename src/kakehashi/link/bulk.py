"""Many ranges in their order, as one continuous stream of requests.

What is asked for next does not wait for what was asked for before: lists of block hashes are
fetched well ahead, and blocks of many files are on their way at once, so that neither a file's
end nor a small file leaves the line idle. Everything moves by the channels' own threads; whoever
iterates only waits for the range that is next.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
import mmap
import sys
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Self

from kakehashi.errors import LinkClosedError, LinkError
from kakehashi.link.locks import Event
from kakehashi.link.manifest import remote_path
from kakehashi.link.pool import Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kakehashi.link.manifest import Entry
    from kakehashi.link.reader import Reader

AHEAD_BYTES = 64 << 20

Wanted = str | tuple[str, int, int]
"""A file's path, or its path, an offset and a length."""

_GROUP = 16
_ITEMS_AHEAD = 1024
# A file so small is checked as a whole: its blocks' hashes, found by hashing what came, must give
# the hash that the manifest names for their list. That saves fetching the list.
_WHOLE_BLOCKS = 16
_MAP_FROM = 1 << 20

_HUGE_PAGE = 2 << 20
_KEPT = 4
_UNUSED = 3
_DIGEST = 32


class Memory:
    """Gives memory for ranges, and uses again what the taker has dropped.

    A large range costs nothing until it is filled; but the kernel clears fresh pages, which is
    a third of the work of reading: so the last few are kept.
    """

    def __init__(self) -> None:
        self._lent: deque[mmap.mmap] = deque(maxlen=_KEPT)

    def __call__(self, length: int) -> memoryview:
        """Return so many bytes; what stands in them is anything."""
        if length < _MAP_FROM:
            return memoryview(bytearray(length))
        for memory in self._lent:
            # Each view of it holds a reference to it; without one only these remain: the
            # queue's, this loop's, and the call's own.
            if length <= len(memory) <= 2 * length and sys.getrefcount(memory) == _UNUSED:
                return memoryview(memory)[:length]
        memory = mmap.mmap(-1, -(-length // _HUGE_PAGE) * _HUGE_PAGE)
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._lent.append(memory)
        return memoryview(memory)[:length]


class _Item:
    """One range, from being asked for to being handed over."""

    def __init__(self, number: int, entry: Entry, offset: int, end: int, block_size: int) -> None:
        self.number = number
        self.entry = entry
        self.offset = offset
        self.end = end
        self.first = offset // block_size
        self.stop = -(-end // block_size) if end > offset else self.first
        # The first block that was not asked for, and how many have not come.
        self.next = self.first
        self.left = self.stop - self.first
        self.hashes: bytes | None = None
        self.buffer: memoryview | None = None
        self.flying: set[Piece] = set()
        self.found: dict[int, bytes] = {}
        self.error: Exception | None = None
        blocks = -(-entry.size // block_size)
        self.whole = self.first == 0 and self.stop == blocks <= _WHOLE_BLOCKS

    def __lt__(self, other: _Item) -> bool:
        return self.number < other.number

    @property
    def done(self) -> bool:
        return self.error is not None or self.left == 0


class _Failed:
    """Stands for a range that could not even be asked for."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.done = True
        self.flying: set[Piece] = set()


class Bulk:
    """The ranges in their order, as memory; made by :meth:`Reader.read_many`.

    Iterating gives a read-only ``memoryview`` for each range. A range that cannot be read raises
    its error in its turn, and the next ones follow. For one thread at a time.

    Parameters
    ----------
    reader : Reader
    wanted : iterable of str or tuple
        Paths, or tuples of path, offset and length. May be endless.
    ahead_bytes : int
        Bound on what is under way or waits to be handed over, besides the range that is next.
    allocate : callable, optional
        Gives so many bytes of memory, writable.
    """

    def __init__(
        self,
        reader: Reader,
        wanted: Iterable[Wanted],
        *,
        ahead_bytes: int = AHEAD_BYTES,
        allocate: Callable[[int], memoryview] | None = None,
    ) -> None:
        if ahead_bytes < 1:
            raise ValueError(f"ahead_bytes must be at least 1, got {ahead_bytes}")
        self._reader = reader
        self._block_size = reader.manifest.block_size
        self._wanted: Iterator[Wanted] | None = iter(wanted)
        self._ahead_bytes = ahead_bytes
        self._allocate = allocate or Memory()
        # Taken before the pool's lock, never after it: the pool calls back without its own.
        self._lock = threading.RLock()
        self._items: deque[_Item | _Failed] = deque()
        # Those of them, in order, that have blocks to ask for, and hashes to check them by.
        self._ready: list[_Item] = []
        self._count = 0
        # Bytes asked for and not yet handed over, and those of them that have not come.
        self._held = 0
        self._flying = 0
        self._ended: LinkClosedError | None = None
        self._wake: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> memoryview:
        """Return the next range, waiting for it if it is not there yet.

        Raises
        ------
        StopIteration
            There are no more ranges, or this was closed.
        LinkError
            As for :meth:`File.read`.
        """
        event = Event()
        while not self.advance(event.set):
            started = time.monotonic()
            event.wait()
            self._reader._pool.waited(time.monotonic() - started)
            event.clear()
        return self.take()

    def close(self) -> None:
        """Let go of all that was not handed over; nothing more is asked for."""
        with self._lock:
            pieces = [piece for item in self._items for piece in item.flying]
            self._items.clear()
            self._ready.clear()
            self._wanted = None
            self._ended = LinkClosedError("this stream was closed; begin another one")
            wake, self._wake = self._wake, None
        self._reader._pool.cancel(pieces)
        if wake is not None:
            wake()

    def advance(self, wake: Callable[[], None]) -> bool:
        """Ask for what there is room for; return if :meth:`take` will not wait.

        Otherwise ``wake`` is called, from another thread, once that is so.
        """
        self._reader.refuse_forked()
        with self._lock:
            self._fill()
            ready = not self._items or self._items[0].done
            self._wake = None if ready else wake
        return ready

    def take(self) -> memoryview:
        """Hand over the next range, which is ready.

        Raises
        ------
        StopIteration
            There is none.
        LinkError
            It could not be read.
        """
        with self._lock:
            if not self._items:
                raise StopIteration
            item = self._items.popleft()
            buffer = None
            if isinstance(item, _Item):
                buffer, item.buffer = item.buffer, None
                self._held -= self._asked(item)
                self._flying -= sum(piece.length for piece in item.flying)
            pieces = list(item.flying)
            item.flying.clear()
            # The room that it leaves is filled before its taker begins to work with it.
            self._fill()
        if item.error is not None:
            self._reader._pool.cancel(pieces)
            raise item.error
        return (buffer if buffer is not None else memoryview(b"")).toreadonly()

    # ------------------------------------------------------------------ asking

    def _fill(self) -> None:
        """With the lock held: take up further ranges, and ask for what there is room for."""
        while self._wanted is not None and len(self._items) < _ITEMS_AHEAD:
            if self._items and self._held >= self._ahead_bytes:
                break
            item = self._pull(self._wanted)
            if item is None:
                self._wanted = None
                break
            self._items.append(item)
            if isinstance(item, _Item) and not item.done:
                self._begin(item)
                self._go_on()
        self._go_on()

    def _pull(self, wanted: Iterator[Wanted]) -> _Item | _Failed | None:
        try:
            one = next(wanted)
        except StopIteration:
            return None
        except Exception as error:  # raised in its turn
            self._wanted = None
            return _Failed(error)
        try:
            path, offset, length = one if isinstance(one, tuple) else (one, 0, None)
            entry = self._reader.manifest.entry(path)
            if self._ended is not None:
                return _Failed(self._ended)
            if offset < 0 or (length is not None and length < 0):
                return _Failed(
                    ValueError(f"offset and length must not be negative: {offset}, {length}")
                )
        except (LinkError, TypeError, ValueError) as error:
            return _Failed(error)
        end = entry.size if length is None else min(entry.size, offset + length)
        self._count += 1
        return _Item(self._count, entry, min(offset, end), end, self._block_size)

    def _begin(self, item: _Item) -> None:
        """Make an item ready to be asked for, which may take its list of hashes first."""
        if item.whole:
            heapq.heappush(self._ready, item)
        else:
            self._reader._ask_list(item.entry, partial(self._listed, item))

    def _go_on(self) -> None:
        """With the lock held: ask for more, in order, as far as there is room."""
        while self._ready and self._ended is None:
            item = self._ready[0]
            if item.done or item.next == item.stop:
                heapq.heappop(self._ready)
            elif self._has_room(item):
                self._ask_group(item)
            else:
                break

    def _has_room(self, item: _Item) -> bool:
        if self._flying >= self._ahead_bytes:
            return False
        return self._held < self._ahead_bytes or (bool(self._items) and item is self._items[0])

    def _ask_group(self, item: _Item) -> None:
        size, entry = self._block_size, item.entry
        if item.buffer is None:
            item.buffer = self._allocate(item.end - item.offset)
        pieces: list[Piece] = []
        path = remote_path(self._reader._manifest_path, entry.path)
        stop = min(item.stop, item.next + _GROUP)
        for index in range(item.next, stop):
            at = index * size
            length = min(size, entry.size - at)
            digest = None
            if item.hashes is not None:
                digest = item.hashes[index * _DIGEST : (index + 1) * _DIGEST]
            inside = item.offset <= at and at + length <= item.end
            into = item.buffer[at - item.offset :][:length] if inside else None
            piece = Piece(path, at, length, digest, into=into, hashed=digest is None)
            piece._waiters.append(partial(self._came, item, index))
            pieces.append(piece)
            self._held += length
            self._flying += length
        item.next = stop
        item.flying.update(pieces)
        self._reader._submit(pieces, urgent=False)

    def _asked(self, item: _Item) -> int:
        size = self._block_size
        return min(item.next * size, item.entry.size) - min(item.first * size, item.entry.size)

    # ------------------------------------------------------------------ coming

    def _listed(self, item: _Item, hashes: bytes | LinkError) -> None:
        """Take an item's list of block hashes, in whichever thread it came."""
        with self._lock:
            if isinstance(hashes, LinkError):
                self._fail(item, hashes)
            else:
                item.hashes = hashes
                heapq.heappush(self._ready, item)
            wake = self._moved()
        if wake is not None:
            wake()

    def _came(self, item: _Item, index: int, piece: Piece) -> None:
        """Take a block, in its channel's thread."""
        with self._lock:
            if piece not in item.flying:
                return
            item.flying.discard(piece)
            self._flying -= piece.length
            if piece.error is not None:
                self._fail(item, piece.error)
            else:
                if piece.into is None:
                    _copy(item, piece)
                if item.hashes is None and piece.found is not None:
                    item.found[index] = piece.found
                item.left -= 1
                if item.left == 0 and item.hashes is None:
                    self._check(item)
            wake = self._moved()
        if wake is not None:
            wake()

    def _fail(self, item: _Item, error: LinkError) -> None:
        item.error = type(error)(*error.args)
        if isinstance(error, LinkClosedError):
            self._ended = error
            for other in self._items:
                if not other.done:
                    other.error = error

    def _check(self, item: _Item) -> None:
        """Compare a whole file with the manifest; if it differs, read it anew block by block."""
        hashes = b"".join(item.found[index] for index in range(item.first, item.stop))
        if hashlib.sha256(hashes).hexdigest() == item.entry.blocks:
            item.hashes = hashes
            self._reader._keep_list(item.entry, hashes)
            return
        self._held -= self._asked(item)
        item.left, item.next = item.stop - item.first, item.first
        item.found.clear()
        item.whole = False
        self._begin(item)

    def _moved(self) -> Callable[[], None] | None:
        """With the lock held: ask for more, and return whom to wake."""
        self._go_on()
        wake = None
        if self._items and self._items[0].done:
            wake, self._wake = self._wake, None
        return wake


def _copy(item: _Item, piece: Piece) -> None:
    """Copy what is wanted of a block that is wanted in part."""
    if item.buffer is None or piece.data is None:
        return
    begin, end = max(item.offset, piece.offset), min(item.end, piece.offset + piece.length)
    item.buffer[begin - item.offset : end - item.offset] = memoryview(piece.data)[
        begin - piece.offset : end - piece.offset
    ]


class Alarm:
    """Wakes a coroutine from another thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def __call__(self, *_: object) -> None:
        """Ring; nobody hears it where the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Wait until it rings."""
        await self._event.wait()
        self._event.clear()


class AsyncBulk:
    """The ranges in their order, for ``async for``; made by :meth:`Reader.aread_many`.

    As :class:`Bulk`. Closing it, or dropping it, frees what it holds; so does cancelling the
    task that it is used in with ``async with``.
    """

    def __init__(self, bulk: Bulk) -> None:
        self._bulk = bulk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._bulk.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> memoryview:
        """Return the next range.

        Raises
        ------
        StopAsyncIteration
            There are no more.
        LinkError
            As for :meth:`File.read`.
        """
        alarm = Alarm()
        while not self._bulk.advance(alarm):
            started = time.monotonic()
            await alarm.wait()
            self._bulk._reader._pool.waited(time.monotonic() - started)
        try:
            return self._bulk.take()
        except StopIteration:
            raise StopAsyncIteration from None

    def close(self) -> None:
        """Let go of all that was not handed over."""
        self._bulk.close()
