"""A ring in memory: what will be asked for next is fetched before it is.

The order is known, so nothing is guessed: threads take the items one after another, and load
each as soon as its bytes have room. An item leaves the ring when it is handed over. What no
thread has begun when it is asked for, because there was no room, or because it is larger than
the whole ring, is loaded by whoever asks: so the ring can never be in its own way, whatever the
sizes are and however many streams share it.

Nothing is ever written to a disk by this. The memory is not locked: nodes keep a session's
memory out of swap as a whole.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Generic, Never, Protocol, Self, TypeVar, cast

from kakehashi.errors import LinkClosedError
from kakehashi.link.locks import Condition, Uninterrupted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Item(Protocol[T_co]):
    """Something to load; both may take long, raise, and are called in any thread, once each."""

    def size(self) -> int:
        """Return the bytes that the loaded value takes."""

    def load(self) -> T_co:
        """Return the value."""


@dataclass(frozen=True)
class RingStats:
    """What a ring did so far.

    Attributes
    ----------
    capacity_bytes : int
        The bound.
    held_bytes, peak_bytes : int
        Loaded, or being loaded: now, and at most.
    prefetched : int
        Items that the ring loaded.
    prefetched_bytes : int
        Bytes of those.
    read_through : int
        Items loaded by whoever asked.
    evicted : int
        Items that left the ring: handed over, or dropped when their stream was closed.
    waited : int
        Times that an item was not there yet when it was asked for.
    waited_s : float
        Seconds spent on that, loading by oneself included, summed over threads.
    """

    capacity_bytes: int = 0
    held_bytes: int = 0
    peak_bytes: int = 0
    prefetched: int = 0
    prefetched_bytes: int = 0
    read_through: int = 0
    evicted: int = 0
    waited: int = 0
    waited_s: float = 0.0


class Ring:
    """Memory that the streams of one process share.

    Parameters
    ----------
    capacity_bytes : int
        Bound on what is held and being loaded, in bytes.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"a ring needs at least one byte, got {capacity_bytes}")
        self._capacity = capacity_bytes
        # One condition for all: events are as rare as items, and room freed by one stream is
        # room for every other.
        self._changed = Condition()
        self._held = 0
        self._peak = 0
        self._prefetched = 0
        self._prefetched_bytes = 0
        self._read_through = 0
        self._evicted = 0
        self._waited = 0
        self._waited_s = 0.0

    def stats(self) -> RingStats:
        """Return the figures so far."""
        with self._changed:
            return RingStats(
                capacity_bytes=self._capacity,
                held_bytes=self._held,
                peak_bytes=self._peak,
                prefetched=self._prefetched,
                prefetched_bytes=self._prefetched_bytes,
                read_through=self._read_through,
                evicted=self._evicted,
                waited=self._waited,
                waited_s=self._waited_s,
            )

    def stream(self, items: Iterable[Item[T]], *, threads: int = 2) -> Stream[T]:
        """Begin to load items in their order.

        Parameters
        ----------
        items : iterable of Item
            May be endless; it is asked for the next one under a lock, so that must be quick.
        threads : int
            Items loaded at once.
        """
        if threads < 1:
            raise ValueError(f"a stream needs at least one thread, got {threads}")
        return Stream(self, iter(items), threads)

    def _reserve(self, size: int) -> None:
        self._held += size
        self._peak = max(self._peak, self._held)

    def _release(self, size: int) -> None:
        self._held -= size
        self._changed.notify_all()


# Items that are larger than the ring take no room, so that this bounds how far it looks ahead.
_MOST_AHEAD = 256


class _State(Enum):
    WAITING = auto()
    LOADING = auto()
    READY = auto()
    THROUGH = auto()
    DROPPED = auto()


class _Failed:
    """Stands for the items that their own iterator failed to give."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def size(self) -> int:
        return 0

    def load(self) -> Never:
        raise self._error


class _Slot(Generic[T]):
    def __init__(self, item: Item[T]) -> None:
        self.item = item
        self.state = _State.WAITING
        self.size = 0
        self.value: T | None = None
        self.error: BaseException | None = None


class Stream(Generic[T]):
    """Items in their order; made by :meth:`Ring.stream`.

    Iterating gives the values. Several threads may share one stream: each item goes to one of
    them. An item that could not be loaded raises its error in its turn, and the next ones follow.
    """

    def __init__(self, ring: Ring, items: Iterator[Item[T]], threads: int) -> None:
        self._ring = ring
        self._changed = ring._changed
        self._items = items
        # What was taken from the iterator and not yet asked for, in order.
        self._slots: deque[_Slot[T]] = deque()
        # Those of them that are to be loaded here and wait for room, in order.
        self._queue: deque[_Slot[T]] = deque()
        self._ended = False
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"ring-{number}", daemon=True)
            for number in range(threads)
        ]
        try:
            with Uninterrupted():
                for thread in self._threads:
                    thread.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        """Return the next value, waiting for it if it is not there yet.

        Raises
        ------
        StopIteration
            There are no more items.
        LinkClosedError
            The stream was closed.
        Exception
            What loading this item raised.
        """
        with self._changed:
            if self._closed:
                raise LinkClosedError("this stream was closed; begin another one")
            slot = self._slots.popleft() if self._slots else self._pull()
            if slot is None:
                raise StopIteration
            if slot.state is _State.READY:
                return self._hand_over(slot)
            started = time.monotonic()
            self._ring._waited += 1
            if slot.state is _State.LOADING:
                try:
                    self._changed.wait_for(lambda: slot.state is not _State.LOADING or self._closed)
                    return self._hand_over(slot)
                finally:
                    self._ring._waited_s += time.monotonic() - started
            slot.state = _State.THROUGH
            self._ring._read_through += 1
            # Whoever waited for room with this item may go on to the next.
            self._changed.notify_all()
        try:
            return slot.item.load()
        finally:
            with self._changed:
                self._ring._waited_s += time.monotonic() - started

    def close(self) -> None:
        """Drop what is loaded and load nothing more; does not wait for loads under way.

        What those loads bring is dropped when it comes; close the reader under them to end them
        at once.
        """
        with self._changed:
            self._closed = True
            for slot in self._slots:
                if slot.state is _State.READY:
                    self._evict(slot)
            self._slots.clear()
            self._queue.clear()
            self._changed.notify_all()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the threads of a stream that is closed or at its end have ended.

        Returns
        -------
        bool
            Whether they have.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _hand_over(self, slot: _Slot[T]) -> T:
        if slot.state is not _State.READY:
            raise LinkClosedError("this stream was closed while it was waited for")
        value, error = slot.value, slot.error
        self._evict(slot)
        if error is not None:
            raise error
        return cast("T", value)

    def _evict(self, slot: _Slot[T]) -> None:
        slot.value = slot.error = None
        self._ring._evicted += 1
        self._ring._release(slot.size)

    def _pull(self) -> _Slot[T] | None:
        if self._ended:
            return None
        try:
            return _Slot(next(self._items))
        except StopIteration:
            self._ended = True
            return None
        except Exception as error:
            self._ended = True
            return _Slot(_Failed(error))

    def _run(self) -> None:
        while (slot := self._take()) is not None:
            error: BaseException | None = None
            value: T | None = None
            try:
                size = slot.item.size()
                if not self._admit(slot, size):
                    continue
                value = slot.item.load()
            except BaseException as caught:  # raised where the item is asked for
                error = caught
            self._settle(slot, value, error)

    def _take(self) -> _Slot[T] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._slots) < _MOST_AHEAD)
            slot = None if self._closed else self._pull()
            if slot is not None:
                self._slots.append(slot)
                self._queue.append(slot)
            return slot

    def _admit(self, slot: _Slot[T], size: int) -> bool:
        """Wait for room and take it, in the items' order; return if the item is to be loaded."""
        ring = self._ring

        def first() -> bool:
            while self._queue and self._queue[0].state is not _State.WAITING:
                self._queue.popleft()
            return bool(self._queue) and self._queue[0] is slot

        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or slot.state is not _State.WAITING
                    or (first() and (size > ring._capacity or ring._held + size <= ring._capacity))
                )
            )
            if self._closed or slot.state is not _State.WAITING:
                return False
            self._queue.popleft()
            self._changed.notify_all()
            if size > ring._capacity:
                return False
            slot.state = _State.LOADING
            slot.size = size
            ring._reserve(size)
            return True

    def _settle(self, slot: _Slot[T], value: T | None, error: BaseException | None) -> None:
        with self._changed:
            if slot.state is _State.THROUGH:
                return
            slot.value, slot.error = value, error
            slot.state = _State.READY
            if error is None:
                self._ring._prefetched += 1
                self._ring._prefetched_bytes += slot.size
            if self._closed:
                slot.state = _State.DROPPED
                self._evict(slot)
            self._changed.notify_all()
