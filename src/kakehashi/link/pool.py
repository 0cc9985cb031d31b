"""Several channels to the store that work off one queue of pieces.

Each channel belongs to one thread, which keeps many reads on their way, checks what comes and
settles the piece. A channel that is lost is opened again for as long as the pool is not closed;
its unfinished pieces go back to the queue, so a cut shows as waiting and never as an error. A
piece whose bytes are wrong is read again, on another channel if there is one, a few times.

The store may have several endpoints with the same files. Channels are spread over them; one that
gave wrong bytes where another gave the right ones is put aside.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import random
import resource
import select
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kakehashi.errors import BlockMismatchError, LinkClosedError, LinkError
from kakehashi.link import pace
from kakehashi.link.figures import Ledger, Pulse, ReplicaStats, Second, Stats
from kakehashi.link.locks import Event, Uninterrupted
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
    from kakehashi.link.manifest import Connect

REREADS = 3
"""How often a piece with wrong bytes is read again before it is an error."""

WRONG_AT_MOST = 2
"""How many pieces an endpoint may give wrongly that another one gives rightly."""

_HANDLES = 32
_PAUSE_S = (0.05, 3.0)
_IDLE_S = 20.0
# While nothing is connected, so many try; more would only crowd the store when it is back.
_SCOUTS = 4
# Not answering for so long is a lost connection, as a rule; it doubles where it was not.
_SILENT_S = 8.0
# A channel must open a file before it can read: so few pieces are not worth splitting up.
_TOGETHER = 4
_REQUESTS = 64
_LOOK_S = 0.5
_NO_FILES = (errno.EMFILE, errno.ENFILE)

Waiter = Callable[["Piece"], None]


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
    into : memoryview or None
        Where the bytes go; without it, into memory of their own. Not to be looked at before the
        piece is done: until then anything may stand there.
    hashed : bool
        Without a digest to compare with: say in ``found`` which one the bytes have.
    done : bool
        The rest stays as it is: ``error`` is set, or the bytes are there.
    data : bytearray, memoryview or None
        The bytes, checked. Shared by all who read them: not to be changed.
    found : bytes or None
        Their SHA-256, if ``hashed``.
    error : LinkError or None
        Why there are none.
    """

    path: str
    offset: int
    length: int
    digest: bytes | None
    into: memoryview | None = None
    hashed: bool = False
    done: bool = False
    data: bytearray | memoryview | None = None
    found: bytes | None = None
    error: LinkError | None = None
    _rereads: int = 0
    _avoid: int | None = None
    _wrong_at: frozenset[int] = frozenset()
    _started: bool = False
    _waiters: list[Waiter] = field(default_factory=list)

    def place(self) -> memoryview | None:
        """Return where the bytes go now."""
        return self.into


@dataclass(eq=False)
class _Replica:
    """One endpoint of the store."""

    number: int
    connect: Connect
    bytes: int = 0
    wrong: int = 0
    aside: str = ""
    failing: bool = False


class _Bell:
    """Wakes a channel's thread.

    Its descriptor is closed with the last reference to it: whoever is ringing still holds one, so
    that nobody rings a number that is another file by now.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)

    def ring(self) -> None:
        os.eventfd_write(self._fd, 1)

    def poll(self, fd: int | None = None) -> select.poll:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if fd is not None:
            poll.register(fd, select.POLLIN)
        return poll

    def wait(self, poll: select.poll, timeout_s: float | None) -> tuple[bool, bool]:
        """Wait; return if it has rung, and if something else is readable."""
        rung = other = False
        for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000):
            if fd == self._fd:
                rung = True
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._fd)
            else:
                other = True
        return rung, other


@dataclass(eq=False)
class _Channel:
    """One thread's own: its number, its bell, and what it has taken from the queue."""

    number: int
    patience_s: float
    replica: _Replica
    # As long as its thread runs; a process may have many pools, and few descriptors.
    bell: _Bell | None = None
    thread: threading.Thread | None = None
    sftp: Sftp | None = None
    connected: bool = False
    # It got no descriptor when it tried last.
    starved: bool = False
    taken: set[Piece] = field(default_factory=set)
    flying: int = 0
    depth: int = 2 * pace.DEPTH_LEAST
    rtt_s: float | None = None

    @property
    def full(self) -> bool:
        return 4 * self.flying >= 3 * self.depth or len(self.taken) >= _REQUESTS

    def ring(self) -> None:
        bell = self.bell
        if bell is not None:
            bell.ring()


class Pool:
    """Channels and the queue they work off.

    Parameters
    ----------
    connects : sequence of callable
        For each endpoint of the store what opens a channel to it. An ``OSError`` or
        ``LinkError`` means "not now": it is tried again; a ``LinkClosedError`` means never: the
        pool closes.
    channels : int
        Number of channels at most; how many there are follows from what they carry.
    patience_s : float
        Longest silence in seconds of a channel that owes answers, after which it is given up.
    """

    def __init__(
        self, connects: Sequence[Connect], *, channels: int, patience_s: float = PATIENCE_S
    ) -> None:
        if not connects:
            raise ValueError("a pool needs at least one endpoint of the store")
        self._replicas = [_Replica(number, one) for number, one in enumerate(connects)]
        most = max(channels, len(connects))
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._urgent: deque[Piece] = deque()
        self._ahead: deque[Piece] = deque()
        self._closed: LinkClosedError | None = None
        self._abandoned = False
        self._channels = [
            _Channel(number, min(_SILENT_S, patience_s), self._replicas[number % len(connects)])
            for number in range(most)
        ]
        self._pace = pace.Pace(most, max(pace.START, len(connects)))
        self._looked = 0.0
        self._ledger = Ledger()

    # ------------------------------------------------------------------ for the reader

    def submit(self, pieces: Iterable[Piece], *, urgent: bool) -> None:
        """Queue pieces; those that somebody waits for go before the others.

        A piece that is queued can be submitted again as urgent. Once the pool is closed, pieces
        are done at once, with a ``LinkClosedError``; and with a ``LinkError`` where this process
        has no descriptor left for a channel.
        """
        # What is queued and never called would wait for ever, and all that comes behind it.
        with Uninterrupted(), self._lock:
            self._ledger.begin()
            before = len(self._urgent) + len(self._ahead)
            (self._urgent if urgent else self._ahead).extend(pieces)
            dropped = self._drop_queue(self._closed) if self._closed is not None else []
            # With a longer queue every channel was called already, and takes what it can.
            if self._closed is None and before < len(self._channels):
                try:
                    self._call()
                except OSError as error:
                    dropped = self._drop_queue(_no_channel(error))
        _tell(dropped)

    def when_done(self, piece: Piece, waiter: Waiter) -> None:
        """Call back once a submitted piece is done, from whichever thread; at once if it is."""
        with self._lock:
            if not piece.done:
                piece._waiters.append(waiter)
                return
        waiter(piece)

    def wait(self, piece: Piece, timeout_s: float | None = None) -> bool:
        """Wait until a submitted piece is done; return if it is."""
        if piece.done:
            return True
        event = Event()
        waiter = _Ringer(event)
        self.when_done(piece, waiter)
        if event.wait(timeout_s):
            return True
        with self._lock:
            if waiter in piece._waiters:
                piece._waiters.remove(waiter)
        return piece.done

    def cancel(self, pieces: Iterable[Piece]) -> None:
        """Let go of pieces that nobody else waits for; what comes for them is thrown away."""
        cancelled = LinkError("the read was cancelled")
        with self._lock:
            for piece in pieces:
                if not piece.done:
                    piece.into = None
                    piece._waiters.clear()
                    piece.error = cancelled
                    piece.done = True

    def waited(self, seconds: float) -> None:
        """Note that somebody has waited."""
        with self._lock:
            self._ledger.waited(seconds)

    def stats(self, cached_blocks: int) -> Stats:
        """Return the figures so far."""
        with self._lock:
            ledger, now, mean = self._ledger, *self._ledger.rates()
            open_ones = [channel for channel in self._channels if channel.connected]
            return Stats(
                bytes=ledger.bytes,
                blocks=ledger.pieces,
                cached_blocks=cached_blocks,
                retries=ledger.rereads,
                reconnects=ledger.reconnects,
                waiting_s=ledger.waited_s,
                repeated=ledger.repeated,
                refused=ledger.refused,
                channels=len(open_ones),
                channel_limit=self._pace.target,
                rtt_s=tuple(one.rtt_s for one in open_ones if one.rtt_s is not None),
                rate_now=now,
                rate_mean=mean,
                replicas=tuple(
                    ReplicaStats(
                        replica.bytes,
                        replica.wrong,
                        sum(one.replica is replica for one in open_ones),
                        replica.aside,
                    )
                    for replica in self._replicas
                ),
            )

    def history(self) -> tuple[Second, ...]:
        """Return what was done second by second."""
        with self._lock:
            return self._ledger.history()

    def pulse(self, since: int) -> Pulse:
        """Return how things are, and what was done from this second on."""
        with self._lock:
            taken = (piece for channel in self._channels for piece in channel.taken)
            wanted = itertools.chain(taken, self._urgent, self._ahead)
            # Also of those that were just closed: what was short is known after it.
            rtts = (one.rtt_s for one in self._channels if one.rtt_s is not None)
            return Pulse(
                seconds=self._ledger.since(since),
                asked=any(not piece.done for piece in wanted),
                rtt_s=min(rtts, default=0.0),
                closed=self._abandoned or self._closed is not None,
            )

    def close(self, reason: str = "the link was closed") -> None:
        """End every channel; what is unfinished is settled with ``LinkClosedError``."""
        self._shut(reason)
        for channel in self._channels:
            # A thread may hang in a connect that is not ours to end; it holds no data.
            if channel.thread is not None and channel.thread is not threading.current_thread():
                channel.thread.join(timeout=1.0)

    def abandon(self) -> None:
        """Have the channels end by themselves.

        For garbage collection: it comes in the middle of anything, also of what holds this pool's
        lock, so that no lock may be taken and nothing waited for.
        """
        self._abandoned = True
        for channel in self._channels:
            channel.ring()

    # ------------------------------------------------------------------ channels

    def _is_over(self) -> bool:
        if self._abandoned:
            self._shut("nobody can read from it any more")
        return self._closed is not None

    def _shut(self, reason: str) -> None:
        with self._lock:
            if self._closed is None:
                self._closed = LinkClosedError(reason)
            for channel in self._channels:
                if channel.sftp is not None:
                    channel.sftp.abort()
                channel.ring()
            dropped = self._drop_queue(self._closed)
        _tell(dropped)

    def _call(self, *, every: bool = False) -> None:
        """With the lock held: wake as many channels as there is work for, the idlest first.

        Raises
        ------
        OSError
            There is no channel, and no descriptor for one.
        """
        queued = len(self._urgent) + len(self._ahead)
        if queued and every:
            queued = len(self._channels)
        wanted = self._ranked()[: self._limit()]
        for channel in sorted(wanted, key=lambda c: (c.flying, not c.connected)):
            if not queued:
                break
            if channel.thread is None:
                try:
                    self._begin(channel)
                except OSError:
                    if all(one.thread is None for one in self._channels):
                        raise
                    continue
            elif not channel.full:
                channel.ring()
            queued -= 1

    def _begin(self, channel: _Channel) -> None:
        bell = _Bell(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        thread = threading.Thread(
            target=self._run, args=(channel, bell), name=f"link-{channel.number}", daemon=True
        )
        channel.bell, channel.thread = bell, thread
        try:
            thread.start()
        except RuntimeError as error:
            channel.bell = channel.thread = None
            raise OSError(errno.EAGAIN, str(error)) from error

    def _ranked(self) -> list[_Channel]:
        """Return the channels, those first that are to go on if there are to be fewer.

        The first channel of each endpoint is always one of them, so that one which was out of
        reach is used again.
        """
        bound = len(self._replicas)
        return sorted(self._channels, key=lambda c: (c.number >= bound, not c.connected, c.number))

    def _limit(self) -> int:
        if any(channel.connected for channel in self._channels):
            return self._pace.target
        return min(self._pace.target, max(_SCOUTS, len(self._replicas)))

    def _is_wanted(self, channel: _Channel) -> bool:
        limit = self._limit()
        if channel.connected and sum(one.connected for one in self._channels) <= limit:
            return True
        return channel in self._ranked()[:limit]

    def _assign(self, channel: _Channel) -> None:
        """Choose the endpoint of a channel that is to be opened."""
        with self._lock:
            own = self._replicas[channel.number % len(self._replicas)]
            if channel.number < len(self._replicas) and not own.aside:
                channel.replica = own
                return
            users = [c.replica for c in self._channels if c.connected]
            channel.replica = min(
                (replica for replica in self._replicas if not replica.aside),
                key=lambda replica: (replica not in users, users.count(replica)),
            )

    def _run(self, channel: _Channel, bell: _Bell) -> None:
        pause, longest = _PAUSE_S
        while self._wait_for_work(channel, bell):
            exchange: _Exchange | None = None
            self._assign(channel)
            try:
                with Sftp(channel.replica.connect(), patience_s=channel.patience_s) as sftp:
                    self._greet(channel, sftp)
                    exchange = _Exchange(self, channel, bell, sftp)
                    exchange.run()
            except LinkClosedError as error:
                self._shut(str(error))
            except (LinkError, OSError) as error:
                self._lost(channel, exchange, error)
            finally:
                with self._lock:
                    channel.sftp = None
                    channel.connected = False
                    self._note_channels()
                self._give_back(channel, list(channel.taken))
            if exchange is not None and exchange.answered:
                pause = _PAUSE_S[0]
            self._rest(bell, pause * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            pause = min(pause * 2, longest)
        with self._lock:
            channel.bell = None
            dropped = self._drop_queue(self._closed) if self._closed is not None else []
        _tell(dropped)

    def _lost(self, channel: _Channel, exchange: _Exchange | None, error: Exception) -> None:
        dropped: list[Piece] = []
        with self._lock:
            if self._closed is not None:
                # It was ended, not lost.
                return
            others = [one for one in self._channels if one is not channel]
            peers = sum(one.connected and one.replica is channel.replica for one in others)
            if exchange is None and peers:
                # The others work: so this one was not granted, and they have to do.
                self._ledger.refused += 1
                connected = sum(one.connected for one in self._channels)
                self._pace.refused(time.monotonic(), connected)
                return
            channel.starved = isinstance(error, OSError) and error.errno in _NO_FILES
            if channel.starved and all(one.starved or one.thread is None for one in others):
                # Only this process itself can make room, so that it must be told.
                dropped = self._drop_queue(_no_channel(error))
            self._ledger.reconnected(len(channel.taken))
            channel.replica.failing = not peers and not channel.starved
            # This one may be out of reach for long, and the others not have been asked yet.
            self._call(every=True)
            if exchange is not None and exchange.silent_s >= channel.patience_s:
                # It may be no cut but a slow store: ask more patiently.
                channel.patience_s = min(2 * channel.patience_s, self._patience_s)
        _tell(dropped)

    def _greet(self, channel: _Channel, sftp: Sftp) -> None:
        with self._lock:
            # From here on closing the pool reaches the channel, also when the store hangs.
            channel.sftp = sftp
            if self._closed is not None:
                # Another one each time: with its traceback it would keep what its thread has.
                raise LinkClosedError(*self._closed.args)
        sftp.greet()
        with self._lock:
            channel.connected = True
            channel.starved = False
            channel.replica.failing = False
            channel.rtt_s = None
            channel.depth = 2 * pace.DEPTH_LEAST
            self._note_channels()
            if self._urgent or self._ahead:
                # The scouts' success is the others' sign.
                self._call()

    def _note_channels(self) -> None:
        self._ledger.connected(sum(channel.connected for channel in self._channels))

    def _wait_for_work(self, channel: _Channel, bell: _Bell) -> bool:
        poll = bell.poll()
        while not self._is_over():
            with self._lock:
                if (self._urgent or self._ahead) and self._is_wanted(channel):
                    return True
            bell.wait(poll, None)
        return False

    def _rest(self, bell: _Bell, pause_s: float) -> None:
        poll = bell.poll()
        end = time.monotonic() + pause_s
        while not self._is_over() and (left := end - time.monotonic()) > 0:
            bell.wait(poll, left)

    def _look(self, now: float) -> None:
        """With the lock held: see how fast things go, and choose the number of channels."""
        if now - self._looked < _LOOK_S / 10:
            return
        self._looked = now
        working = [one for one in self._channels if one.connected]
        before = self._pace.target
        self._pace.tick(
            now,
            self._ledger.bytes,
            connected=len(working),
            busy=bool(self._urgent or self._ahead)
            or 2 * sum(one.flying for one in working) >= sum(one.depth for one in working),
            rtt_s=min((one.rtt_s for one in working if one.rtt_s is not None), default=None),
        )
        if self._pace.target > before and (self._urgent or self._ahead):
            self._call(every=True)

    def _far(self, rtt_s: float) -> None:
        with self._lock:
            before = self._pace.target
            self._pace.far(rtt_s)
            if self._pace.target > before:
                self._call(every=True)

    def _has_idled(self, channel: _Channel) -> bool:
        """Tell whether a channel that had nothing to do for long is to be closed."""
        with self._lock:
            working = [one for one in self._ranked() if one.connected]
            if any(one.taken for one in working):
                return False
            self._pace.rest()
            return channel is not working[0]

    # ------------------------------------------------------------------ pieces

    def _take(self, channel: _Channel) -> list[Piece]:
        """Take this channel's share of the queue."""
        with self._lock:
            mine: list[Piece] = []
            queued = len(self._urgent) + len(self._ahead)
            if not queued or not self._is_wanted(channel):
                return mine
            others = [c for c in self._channels if c.connected and c is not channel]
            share = max(_TOGETHER, -(-queued // (len(others) + 1)))
            share = min(share, _REQUESTS - len(channel.taken))
            for queue in (self._urgent, self._ahead):
                kept: list[Piece] = []
                while queue and len(mine) < share and channel.flying < channel.depth:
                    piece = queue.popleft()
                    if piece._started or piece.done:
                        continue
                    if piece._avoid is not None and self._avoids(piece, channel, others):
                        kept.append(piece)
                        continue
                    piece._started = True
                    channel.flying += piece.length
                    mine.append(piece)
                queue.extendleft(reversed(kept))
            channel.taken.update(mine)
            return mine

    def _avoids(self, piece: Piece, channel: _Channel, others: Sequence[_Channel]) -> bool:
        """Tell whether a piece that came wrongly is to be left to another channel."""
        wrong = piece._wrong_at
        if any(not (r.number in wrong or r.aside or r.failing) for r in self._replicas):
            return channel.replica.number in wrong
        return bool(others) and piece._avoid == channel.number

    def _give_back(self, channel: _Channel, pieces: Iterable[Piece]) -> None:
        """Queue pieces again that this channel had taken, before all others."""
        with self._lock:
            for piece in sorted(pieces, key=lambda p: p.offset, reverse=True):
                channel.taken.discard(piece)
                channel.flying -= piece.length
                if not piece.done:
                    piece._started = False
                    self._urgent.appendleft(piece)
            dropped = self._drop_queue(self._closed) if self._closed is not None else []
            if self._closed is None:
                # It may be for a channel that was not needed before.
                self._call(every=True)
            for other in self._channels:
                other.ring()
        _tell(dropped)

    def _settle(self, channel: _Channel, piece: Piece) -> None:
        """Have a piece done; those who wait for it are to be told once nothing else holds it."""
        now = time.monotonic()
        with self._lock:
            channel.taken.discard(piece)
            channel.flying -= piece.length
            if piece.error is None:
                self._ledger.arrived(piece.length)
                channel.replica.bytes += piece.length
                if piece._wrong_at:
                    self._blame(piece._wrong_at - {channel.replica.number})
            self._look(now)
            if piece.done:
                piece.data = None
            piece.done = True
            piece.into = None

    def _blame(self, numbers: frozenset[int]) -> None:
        """Note that these endpoints gave a piece wrongly that another one has given rightly."""
        for number in numbers:
            replica = self._replicas[number]
            replica.wrong += 1
            in_use = sum(not one.aside for one in self._replicas)
            if replica.wrong > WRONG_AT_MOST and not replica.aside and in_use > 1:
                replica.aside = (
                    f"{replica.wrong} pieces were wrong that another endpoint of the store gave "
                    "rightly; tell the store's operators"
                )
                for channel in self._channels:
                    channel.ring()

    def _drop_queue(self, error: LinkError) -> list[Piece]:
        """With the lock held: end what nobody has taken."""
        dropped: list[Piece] = []
        for queue in (self._urgent, self._ahead):
            for piece in queue:
                if not piece._started and not piece.done:
                    piece._started = piece.done = True
                    piece.error = error
                    dropped.append(piece)
            queue.clear()
        return dropped


class _Ringer:
    """Sets an event; unlike a bound method it is equal only to itself."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __call__(self, _: Piece) -> None:
        self._event.set()


class _Exchange:
    """One channel's conversation with the store, from its opening to its loss."""

    def __init__(self, pool: Pool, channel: _Channel, bell: _Bell, sftp: Sftp) -> None:
        self.answered = False
        self._pool = pool
        self._channel = channel
        self._bell = bell
        self._sftp = sftp
        self._handles: OrderedDict[str, bytes] = OrderedDict()
        self._opening: dict[str, list[Piece]] = {}
        self._opens: dict[int, str] = {}
        self._reads: dict[int, Piece] = {}
        self._timed: tuple[int, float] | None = None
        self._settled: list[Piece] = []
        self._moved = 0
        self._heard = time.monotonic()
        self._mark = (self._heard, 0)

    @property
    def silent_s(self) -> float:
        """For how long nothing was heard, in seconds."""
        return time.monotonic() - self._heard

    def run(self) -> None:
        """Work off the queue until the pool is closed or the channel is not wanted any more.

        Raises
        ------
        LinkError
            The channel is lost.
        """
        pool, channel, sftp = self._pool, self._channel, self._sftp
        poll = self._bell.poll(sftp.fileno())
        while not pool._is_over() and not channel.replica.aside:
            if not channel.full:
                for piece in pool._take(channel):
                    self._want(piece)
                sftp.flush()
            if not sftp.outstanding:
                if self._idle(poll):
                    return
            elif channel.full or self._is_answered(poll):
                try:
                    self._answer(sftp.receive())
                finally:
                    # Not sooner: until here the answer held the memory that it is in.
                    _tell(self._settled)
                    self._settled.clear()
                self.answered = True
                self._heard = time.monotonic()

    def _idle(self, poll: select.poll) -> bool:
        """Wait for work; return if the channel is to be closed instead."""
        pool, channel = self._pool, self._channel
        with pool._lock:
            if not pool._is_wanted(channel):
                return True
        rung, readable = self._bell.wait(poll, _IDLE_S)
        if readable:
            raise LinkError("the channel to the store was closed while it was idle")
        self._heard = time.monotonic()
        self._mark = (self._heard, self._moved)
        return not rung and pool._has_idled(channel)

    def _is_answered(self, poll: select.poll) -> bool:
        """Wait for an answer, or for more to ask; return if it is an answer."""
        left = self._channel.patience_s - self.silent_s
        if left > 0:
            return self._bell.wait(poll, left)[1]
        raise LinkError(f"the store was silent for {self._channel.patience_s:g} s")

    def _want(self, piece: Piece) -> None:
        handle = self._handles.get(piece.path)
        if handle is not None:
            self._handles.move_to_end(piece.path)
            self._read(handle, piece)
        elif piece.path in self._opening:
            self._opening[piece.path].append(piece)
        else:
            alone = not self._sftp.outstanding
            self._opening[piece.path] = [piece]
            request = self._sftp.ask_open(piece.path)
            self._opens[request] = piece.path
            if alone:
                # Nothing is in its way, so it takes one round trip and little more. The clock is
                # read first: this thread may get to run again only after the answer has come.
                self._timed = (request, time.monotonic())
                self._sftp.flush()

    def _read(self, handle: bytes, piece: Piece) -> None:
        request = self._sftp.ask_read(handle, piece.offset, piece.length, piece.place)
        self._reads[request] = piece

    def _answer(self, reply: Reply) -> None:
        if reply.request in self._reads:
            self._came(self._reads.pop(reply.request), reply)
        elif reply.request in self._opens:
            if self._timed is not None and reply.request == self._timed[0]:
                found = time.monotonic() - self._timed[1]
                self._channel.rtt_s = min(found, self._channel.rtt_s or found)
                self._pool._far(found)
            self._opened(self._opens.pop(reply.request), reply)

    def _opened(self, path: str, reply: Reply) -> None:
        waiting = self._opening.pop(path)
        if isinstance(reply, Opened):
            self._handles[path] = reply.handle
            for piece in waiting:
                self._read(reply.handle, piece)
            self._forget_surplus()
            self._sftp.flush()
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
        if isinstance(reply, Data):
            problem = None if piece.done else _problem(piece, reply.data)
            if problem is None:
                self._measure(piece.length)
                if piece.into is None:
                    piece.data = reply.data
                self._settle(piece)
            else:
                self._again(piece, BlockMismatchError(f"{_where(piece)}: {problem}"))
        elif isinstance(reply, Status) and reply.code == STATUS_EOF:
            self._again(
                piece,
                BlockMismatchError(f"{_where(piece)}: the file at the store ends before them"),
            )
        elif isinstance(reply, Status):
            self._again(
                piece,
                LinkError(f"{_where(piece)}: the store cannot read them: {reply.message}"),
            )

    def _settle(self, piece: Piece) -> None:
        self._pool._settle(self._channel, piece)
        self._settled.append(piece)

    def _measure(self, length: int) -> None:
        """Choose from time to time how much to ask for at once."""
        self._moved += length
        now = time.monotonic()
        began, before = self._mark
        if now - began >= _LOOK_S:
            channel = self._channel
            channel.depth = pace.depth((self._moved - before) / (now - began), channel.rtt_s)
            channel.patience_s = min(_SILENT_S, self._pool._patience_s)
            self._mark = (now, self._moved)

    def _again(self, piece: Piece, error: LinkError) -> None:
        """Have a piece read anew elsewhere, or give it up with this error."""
        # The file may have been replaced at the store: a handle would keep the old one.
        stale = self._handles.pop(piece.path, None)
        if stale is not None:
            self._sftp.ask_close(stale)
        pool, channel = self._pool, self._channel
        if piece._rereads >= REREADS + len(pool._replicas) - 1:
            piece.error = error
            self._settle(piece)
            return
        piece._rereads += 1
        piece._avoid = channel.number
        piece._wrong_at |= {channel.replica.number}
        with pool._lock:
            pool._ledger.reread()
        pool._give_back(channel, [piece])


def _tell(pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        waiters, piece._waiters = piece._waiters, []
        for waiter in waiters:
            waiter(piece)


def _no_channel(error: Exception) -> LinkError:
    reason = error.strerror if isinstance(error, OSError) else error
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return LinkError(
            f"no channel to the store can be opened: {reason}; this process may have {most} files "
            "open at once: close stores and files that are not needed any more, or raise the "
            "limit (ulimit -n)"
        )
    return LinkError(
        f"no channel to the store can be opened: {reason}; the node has none left for this "
        "session: end other programs in it, or ask the site's operators"
    )


def _where(piece: Piece) -> str:
    return f"{piece.path}, bytes {piece.offset} to {piece.offset + piece.length}"


def _problem(piece: Piece, data: bytearray | memoryview) -> str | None:
    if len(data) != piece.length:
        return f"only {len(data)} bytes came"
    if piece.digest is None and not piece.hashed:
        return None
    found = hashlib.sha256(data).digest()
    if piece.digest is not None and found != piece.digest:
        return (
            "the bytes are not those that the manifest names; the file at the store was changed "
            "or damaged, tell the store's operators"
        )
    piece.found = found
    return None
