"""Several channels to the store that work off one queue of pieces.

Each channel belongs to one thread, which keeps many reads on their way, checks what comes and
settles the piece. A channel that is lost is opened again for as long as the pool is not closed;
its unfinished pieces go back to the queue, so a cut shows as waiting and never as an error. A
piece whose bytes are wrong is read again, on another channel if there is one, a few times.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kakehashi.errors import BlockMismatchError, LinkClosedError, LinkError
from kakehashi.link.sftp import (
    PATIENCE_S,
    STATUS_EOF,
    Data,
    Opened,
    Reply,
    Sftp,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kakehashi.link.manifest import Connect

REREADS = 3
"""How often a piece with wrong bytes is read again before it is an error."""

_HANDLES = 32
_PAUSE_S = (0.05, 5.0)


@dataclass(slots=True, eq=False)
class Piece:
    """A range of a file that is wanted.

    Attributes
    ----------
    path : str
        Path at the store.
    offset, length : int
        The range in bytes.
    digest : bytes or None
        SHA-256 that the bytes must have; ``None`` where the caller checks more than one piece
        together.
    done : bool
        Either ``data`` or ``error`` is set, and stays as it is.
    data : bytearray or None
        The bytes, checked. Shared by all who read them: not to be changed.
    error : LinkError or None
        Why there are none.
    """

    path: str
    offset: int
    length: int
    digest: bytes | None
    done: bool = False
    data: bytearray | None = None
    error: LinkError | None = None
    _rereads: int = 0
    _avoid: int | None = None
    _started: bool = False
    _event: threading.Event | None = None


@dataclass
class Counts:
    """What the pool did; changed under its lock only."""

    bytes: int = 0
    pieces: int = 0
    rereads: int = 0
    reconnects: int = 0


@dataclass(eq=False)
class _Channel:
    """One thread's own: its number, its bell, and what it has taken from the queue."""

    number: int
    bell: int = field(default_factory=lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    sftp: Sftp | None = None
    connected: bool = False
    taken: set[Piece] = field(default_factory=set)

    def __del__(self) -> None:
        # Not sooner: a thread that still runs could ring a number that is another file by now.
        os.close(self.bell)

    def ring(self) -> None:
        os.eventfd_write(self.bell, 1)

    def poll(self, fd: int | None = None) -> select.poll:
        poll = select.poll()
        poll.register(self.bell, select.POLLIN)
        if fd is not None:
            poll.register(fd, select.POLLIN)
        return poll

    def wait(self, poll: select.poll, timeout_s: float | None) -> bool:
        """Wait for the bell, or something else to be readable; return if it was the latter."""
        ready = poll.poll(None if timeout_s is None else timeout_s * 1000)
        for fd, _ in ready:
            if fd == self.bell:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.bell)
                return len(ready) > 1
        return bool(ready)


class Pool:
    """Channels and the queue they work off.

    Parameters
    ----------
    connect : callable
        Opens a channel. An ``OSError`` or ``LinkError`` means "not now": it is tried again; a
        ``LinkClosedError`` means never: the pool closes.
    channels : int
        Number of channels.
    depth : int
        Reads on their way at once on each channel.
    patience_s : float
        Seconds of silence of a channel that owes answers, after which it is given up.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        channels: int,
        depth: int,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._connect = connect
        self._depth = depth
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._urgent: deque[Piece] = deque()
        self._ahead: deque[Piece] = deque()
        self._closed: LinkClosedError | None = None
        self._channels = [_Channel(number) for number in range(channels)]
        self._threads: list[threading.Thread] = []
        self._counts = Counts()

    def submit(self, pieces: Iterable[Piece], *, urgent: bool) -> None:
        """Queue pieces; those that somebody waits for go before those read ahead.

        A piece that is queued for reading ahead can be submitted again as urgent. Once the pool
        is closed, pieces are done at once, with a ``LinkClosedError``.
        """
        with self._lock:
            (self._urgent if urgent else self._ahead).extend(pieces)
            if self._closed is not None:
                self._drop_queue()
                return
            if not self._threads:
                self._start()
            self._ring_some()

    def wait(self, piece: Piece, timeout_s: float | None = None) -> bool:
        """Wait until a submitted piece is done; return if it is."""
        with self._lock:
            if piece.done:
                return True
            if piece._event is None:
                piece._event = threading.Event()
        return piece._event.wait(timeout_s)

    def counts(self) -> Counts:
        """Return a copy of the figures."""
        with self._lock:
            counts = self._counts
            return Counts(counts.bytes, counts.pieces, counts.rereads, counts.reconnects)

    def close(self, reason: str = "the link was closed") -> None:
        """End every channel; what is unfinished is settled with ``LinkClosedError``."""
        self._shut(reason)
        for thread in self._threads:
            # A thread may hang in a connect that is not ours to end; it holds no data.
            thread.join(timeout=1.0)

    def _shut(self, reason: str) -> None:
        with self._lock:
            if self._closed is None:
                self._closed = LinkClosedError(reason)
            for channel in self._channels:
                if channel.sftp is not None:
                    channel.sftp.abort()
                channel.ring()
            self._drop_queue()

    def _start(self) -> None:
        for channel in self._channels:
            thread = threading.Thread(
                target=self._run, args=(channel,), name=f"link-{channel.number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _ring_some(self) -> None:
        """Wake as many channels as there is work for; the ones with the least to do first."""
        queued = len(self._urgent) + len(self._ahead)
        for channel in sorted(self._channels, key=lambda c: (len(c.taken), not c.connected))[
            :queued
        ]:
            if len(channel.taken) < self._depth:
                channel.ring()

    def _take(self, channel: _Channel) -> list[Piece]:
        """Take this channel's share of the queue."""
        with self._lock:
            others = sum(c.connected for c in self._channels if c is not channel)
            queued = len(self._urgent) + len(self._ahead)
            share = min(self._depth - len(channel.taken), -(-queued // (others + 1)))
            mine: list[Piece] = []
            for queue in (self._urgent, self._ahead):
                kept: list[Piece] = []
                while queue and len(mine) < share:
                    piece = queue.popleft()
                    if piece._started:
                        continue
                    if others and piece._avoid == channel.number:
                        kept.append(piece)
                        continue
                    piece._started = True
                    mine.append(piece)
                queue.extendleft(reversed(kept))
            channel.taken.update(mine)
            return mine

    def _give_back(self, channel: _Channel, pieces: Iterable[Piece]) -> None:
        """Queue pieces again that this channel had taken, before all others."""
        with self._lock:
            for piece in sorted(pieces, key=lambda p: p.offset, reverse=True):
                channel.taken.discard(piece)
                piece._started = False
                self._urgent.appendleft(piece)
            for other in self._channels:
                other.ring()

    def _settle(self, channel: _Channel, piece: Piece) -> None:
        with self._lock:
            channel.taken.discard(piece)
            if piece.data is not None:
                self._counts.bytes += piece.length
                self._counts.pieces += 1
            _finish(piece)

    def _drop_queue(self) -> None:
        """With the lock held: end what nobody has taken; the pool is closed."""
        for queue in (self._urgent, self._ahead):
            for piece in queue:
                if not piece._started:
                    piece._started = True
                    piece.error = self._closed
                    _finish(piece)
            queue.clear()

    def _run(self, channel: _Channel) -> None:
        pause, longest = _PAUSE_S
        while self._wait_for_work(channel):
            answered = False
            try:
                with Sftp(self._connect(), patience_s=self._patience_s) as sftp:
                    self._greet(channel, sftp)
                    exchange = _Exchange(self, channel, sftp)
                    try:
                        exchange.run()
                    finally:
                        answered = exchange.answered
            except LinkClosedError as error:
                self._shut(str(error))
            except (LinkError, OSError):
                with self._lock:
                    self._counts.reconnects += 1
            finally:
                with self._lock:
                    channel.sftp = None
                    channel.connected = False
                self._give_back(channel, list(channel.taken))
            if answered:
                pause = _PAUSE_S[0]
            self._rest(channel, pause)
            pause = min(pause * 2, longest)
        with self._lock:
            self._drop_queue()

    def _greet(self, channel: _Channel, sftp: Sftp) -> None:
        with self._lock:
            # From here on closing the pool reaches the channel, also when the store hangs.
            channel.sftp = sftp
            if self._closed is not None:
                raise self._closed
        sftp.greet()
        with self._lock:
            channel.connected = True

    def _wait_for_work(self, channel: _Channel) -> bool:
        bell = channel.poll()
        while True:
            with self._lock:
                if self._closed is not None:
                    return False
                if self._urgent or self._ahead:
                    return True
            channel.wait(bell, None)

    def _rest(self, channel: _Channel, pause_s: float) -> None:
        bell = channel.poll()
        end = time.monotonic() + pause_s
        while self._closed is None and (left := end - time.monotonic()) > 0:
            channel.wait(bell, left)


class _Exchange:
    """One channel's conversation with the store, from its opening to its loss."""

    def __init__(self, pool: Pool, channel: _Channel, sftp: Sftp) -> None:
        self.answered = False
        self._pool = pool
        self._channel = channel
        self._sftp = sftp
        self._handles: OrderedDict[str, bytes] = OrderedDict()
        self._opening: dict[str, list[Piece]] = {}
        self._opens: dict[int, str] = {}
        self._reads: dict[int, Piece] = {}

    def run(self) -> None:
        """Work off the queue until the pool is closed.

        Raises
        ------
        LinkError
            The channel is lost.
        """
        pool, channel, sftp = self._pool, self._channel, self._sftp
        poll = channel.poll(sftp.fileno())
        heard = time.monotonic()
        while pool._closed is None:
            idle = sftp.outstanding == 0
            for piece in pool._take(channel):
                self._want(piece)
            sftp.flush()
            now = time.monotonic()
            if idle:
                heard = now
            left = heard + pool._patience_s - now
            if left <= 0:
                raise LinkError(f"the store was silent for {pool._patience_s:g} s")
            if channel.wait(poll, left if sftp.outstanding else None):
                if not sftp.outstanding:
                    raise LinkError("the channel to the store was closed while it was idle")
                self._answer(sftp.receive())
                self.answered = True
                heard = time.monotonic()

    def _want(self, piece: Piece) -> None:
        handle = self._handles.get(piece.path)
        if handle is not None:
            self._handles.move_to_end(piece.path)
            self._read(handle, piece)
        elif piece.path in self._opening:
            self._opening[piece.path].append(piece)
        else:
            self._opening[piece.path] = [piece]
            self._opens[self._sftp.ask_open(piece.path)] = piece.path

    def _read(self, handle: bytes, piece: Piece) -> None:
        self._reads[self._sftp.ask_read(handle, piece.offset, piece.length)] = piece

    def _answer(self, reply: Reply) -> None:
        if reply.request in self._opens:
            self._opened(self._opens.pop(reply.request), reply)
        elif reply.request in self._reads:
            self._came(self._reads.pop(reply.request), reply)

    def _opened(self, path: str, reply: Reply) -> None:
        waiting = self._opening.pop(path)
        if isinstance(reply, Opened):
            self._handles[path] = reply.handle
            for piece in waiting:
                self._read(reply.handle, piece)
            self._forget_surplus()
        elif isinstance(reply, Status):
            for piece in waiting:
                self._again(
                    piece,
                    LinkError(
                        f"the store cannot open {path}, which the manifest names: {reply.message}"
                    ),
                )

    def _forget_surplus(self) -> None:
        """Close the handles used longest ago; a read under way is answered before its close."""
        while len(self._handles) > _HANDLES:
            _, handle = self._handles.popitem(last=False)
            self._sftp.ask_close(handle)

    def _came(self, piece: Piece, reply: Reply) -> None:
        where = f"{piece.path}, bytes {piece.offset} to {piece.offset + piece.length}"
        if isinstance(reply, Data):
            problem = _problem(piece, reply.data)
            if problem is None:
                piece.data = reply.data
                self._pool._settle(self._channel, piece)
            else:
                self._again(piece, BlockMismatchError(f"{where}: {problem}"))
        elif isinstance(reply, Status) and reply.code == STATUS_EOF:
            self._again(
                piece, BlockMismatchError(f"{where}: the file at the store ends before them")
            )
        elif isinstance(reply, Status):
            self._again(piece, LinkError(f"{where}: the store cannot read them: {reply.message}"))

    def _again(self, piece: Piece, error: LinkError) -> None:
        """Have a piece read anew elsewhere, or give it up with this error."""
        # The file may have been replaced at the store: a handle would keep the old one.
        stale = self._handles.pop(piece.path, None)
        if stale is not None:
            self._sftp.ask_close(stale)
        if piece._rereads == REREADS:
            piece.error = error
            self._pool._settle(self._channel, piece)
            return
        piece._rereads += 1
        piece._avoid = self._channel.number
        with self._pool._lock:
            self._pool._counts.rereads += 1
        self._pool._give_back(self._channel, [piece])


def _finish(piece: Piece) -> None:
    piece.done = True
    if piece._event is not None:
        piece._event.set()


def _problem(piece: Piece, data: bytearray) -> str | None:
    if len(data) != piece.length:
        return f"only {len(data)} bytes came"
    if piece.digest is not None and hashlib.sha256(data).digest() != piece.digest:
        return (
            "the bytes are not those that the manifest names; the file at the store was changed "
            "or damaged, tell the store's operators"
        )
    return None
