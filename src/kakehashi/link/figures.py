"""What a reader did: counts, and a history by the second."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HISTORY_S = 3600
_RECENT_S = 3


@dataclass(frozen=True, slots=True)
class Second:
    """One second in which something happened.

    Attributes
    ----------
    at : int
        Its beginning, seconds since 1970.
    bytes, rereads, reconnects : int
        As in :class:`Stats`, within this second.
    waited_s : float
        Seconds of waiting that ended in this second, summed over threads.
    channels : int
        Channels at its end.
    """

    at: int
    bytes: int
    rereads: int
    reconnects: int
    waited_s: float
    channels: int


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a reader is just now, for who looks again and again.

    Attributes
    ----------
    seconds : tuple of Second
        What was done since the time asked for, with the second that is not over yet.
    asked : bool
        Whether bytes are asked for that have not come.
    rtt_s : float
        Shortest round trip of the channels, as each was last opened; 0 if none is known.
    closed : bool
        Whether nothing more will be done.
    """

    seconds: tuple[Second, ...]
    asked: bool
    rtt_s: float
    closed: bool


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """What one of the endpoints of the store did.

    Attributes
    ----------
    bytes : int
        Verified bytes that came from it.
    wrong : int
        Pieces that it gave wrongly, or not at all, and another endpoint gave rightly.
    channels : int
        Channels to it now.
    aside : str
        Why nothing is read from it any more; empty for one in use.
    """

    bytes: int
    wrong: int
    channels: int
    aside: str


@dataclass(frozen=True)
class Stats:
    """What a reader has done so far.

    Attributes
    ----------
    bytes, blocks : int
        Verified bytes and pieces that came over the link.
    cached_blocks : int
        Blocks that a read found in memory or already on their way.
    retries : int
        Pieces read again because what came was wrong.
    reconnects : int
        Channels lost, and attempts to open one that failed.
    waiting_s : float
        Seconds that reads waited for the link, summed over threads.
    repeated : int
        Pieces asked for again because their channel was lost.
    refused : int
        Further channels that the session did not give; it has a bound for all of its processes.
    channels : int
        Channels open now.
    channel_limit : int
        Channels that the reader presently finds worth having.
    rtt_s : tuple of float
        Round trip of each open channel that has been measured, in seconds: the shortest answer
        to a small request.
    rate_now, rate_mean : float
        Bytes a second: in the last three seconds, and since the first request.
    replicas : tuple of ReplicaStats
        The endpoints, in the order in which they were given.
    """

    bytes: int
    blocks: int
    cached_blocks: int
    retries: int
    reconnects: int
    waiting_s: float
    repeated: int = 0
    refused: int = 0
    channels: int = 0
    channel_limit: int = 0
    rtt_s: tuple[float, ...] = ()
    rate_now: float = 0.0
    rate_mean: float = 0.0
    replicas: tuple[ReplicaStats, ...] = ()


class Ledger:
    """Counts as they come; whoever calls holds the pool's lock."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.bytes = 0
        self.pieces = 0
        self.rereads = 0
        self.reconnects = 0
        self.repeated = 0
        self.refused = 0
        self.waited_s = 0.0
        self._clock = clock
        self._begun: float | None = None
        self._seconds: deque[Second] = deque(maxlen=HISTORY_S)
        self._at = 0
        self._open = (0, 0, 0, 0.0)
        self._channels = 0

    def begin(self) -> None:
        """Note that something is asked for."""
        if self._begun is None:
            self._begun = self._clock()

    def arrived(self, length: int) -> None:
        """Note a verified piece."""
        self._turn()
        self.bytes += length
        self.pieces += 1

    def reread(self) -> None:
        """Note a piece that came wrongly and is read again."""
        self._turn()
        self.rereads += 1

    def reconnected(self, pieces: int) -> None:
        """Note a channel that was lost, with the pieces that it owed."""
        self._turn()
        self.reconnects += 1
        self.repeated += pieces

    def waited(self, seconds: float) -> None:
        """Note the end of some waiting."""
        self._turn()
        self.waited_s += seconds

    def connected(self, channels: int) -> None:
        """Note how many channels there are."""
        self._turn()
        self._channels = channels

    def history(self) -> tuple[Second, ...]:
        """Return the seconds of the last hour in which something happened, oldest first."""
        self._turn()
        return tuple(self._seconds)

    def since(self, at: int) -> tuple[Second, ...]:
        """Return the seconds from this one on, oldest first, with the one that is not over."""
        self._turn()
        found = [self._running()]
        for second in reversed(self._seconds):
            if second.at < at:
                break
            found.append(second)
        return tuple(reversed(found))

    def rates(self) -> tuple[float, float]:
        """Return the bytes a second of the last few whole seconds, and since the beginning."""
        self._turn()
        now = self._clock()
        recent = 0
        for second in reversed(self._seconds):
            if second.at < int(now) - _RECENT_S:
                break
            recent += second.bytes
        elapsed = now - self._begun if self._begun is not None else 0.0
        return recent / _RECENT_S, self.bytes / elapsed if elapsed > 0 else 0.0

    def _turn(self) -> None:
        """Close the second that is over; counts belong to the one in which they are noted."""
        at = int(self._clock())
        if at == self._at:
            return
        new = (self.bytes, self.rereads, self.reconnects, self.waited_s)
        if new != self._open:
            self._seconds.append(self._running())
        self._at, self._open = at, new

    def _running(self) -> Second:
        old = self._open
        return Second(
            at=self._at,
            bytes=self.bytes - old[0],
            rereads=self.rereads - old[1],
            reconnects=self.reconnects - old[2],
            waited_s=self.waited_s - old[3],
            channels=self._channels,
        )
