"""How many channels are worth having, and how much to ask each for at once.

One connection of OpenSSH carries about 1.4 MB per round trip, whatever the line: a fast and
distant store needs many, a near one needs two. So the number grows for as long as each step
brings more bytes a second, and a step that brings nothing is taken back.
"""

from __future__ import annotations

import math

START = 2
_START_FAR = 8
# What a line is taken for until its rate is known: 2 Gbit/s.
_GUESS = 250e6
WINDOW_BYTES = 1_400_000
"""What one connection of OpenSSH carries per round trip."""

DEPTH_LEAST, DEPTH_MOST = 1 << 20, 4 << 20
"""Bytes asked for at once on a channel; more than its window is never of use."""

_GROWN = 1.08
_MEASURE_S = 0.4
_MEASURE_ROUNDS = 8
_HOLD_S = (5.0, 120.0)
_WINDOW_SHARE = 0.7


class Pace:
    """Chooses the number of channels from what they carry.

    Parameters
    ----------
    most : int
        Never more than these.
    least : int
        Where to begin; also what is left after a pause.

    Attributes
    ----------
    target : int
        Channels worth having now.
    """

    def __init__(self, most: int, least: int = START) -> None:
        self.most = most
        self.least = min(least, most)
        self.target = self.least
        self._settled = (self.least, 0.0)
        self._hold_until = 0.0
        self._refused_until = 0.0
        self._hold_s = _HOLD_S[0]
        self._since: tuple[float, int, int] | None = None

    def tick(
        self, now: float, moved: int, *, connected: int, busy: bool, rtt_s: float | None
    ) -> None:
        """Take note of how far things are; may change the target.

        Parameters
        ----------
        now : float
            Seconds, of a clock that only goes forward.
        moved : int
            Bytes moved so far in all.
        connected : int
            Channels that work.
        busy : bool
            More was wanted than could be asked for: only then the rate says something.
        rtt_s : float or None
            Round trip, if it is known.
        """
        if not busy or connected < self.target:
            self._since = None
            return
        if self._since is None or self._since[2] != connected:
            self._since = (now, moved, connected)
            return
        began, before, _ = self._since
        if now - began < max(_MEASURE_S, _MEASURE_ROUNDS * (rtt_s or 0.0)):
            return
        rate = (moved - before) / (now - began)
        self._since = (now, moved, connected)
        self._judge(now, rate, bound=_by_window(rate, connected, rtt_s))

    def far(self, rtt_s: float) -> None:
        """Take note of a round trip; at the beginning it says what a common line would need."""
        if self._settled[1] == 0.0 and self.target == self.least:
            needed = math.ceil(_GUESS * rtt_s / WINDOW_BYTES) + 1
            self.target = min(self.most, max(self.target, min(needed, _START_FAR)))
            self._settled = (self.target, 0.0)

    def refused(self, now: float, connected: int) -> None:
        """Take note that a channel was not given: what there is has to do for a while."""
        self.target = min(self.most, max(1, connected))
        self._settled = (self.target, self._settled[1])
        self._hold(now)
        self._refused_until = self._hold_until

    def rest(self) -> None:
        """Take note that nothing was wanted for a while."""
        self.target = self.least
        self._settled = (self.least, 0.0)
        self._since = None
        self._hold_until = 0.0
        self._hold_s = _HOLD_S[0]

    def _judge(self, now: float, rate: float, *, bound: bool) -> None:
        channels, best = self._settled
        if self.target > channels:
            if rate < best * _GROWN:
                self.target = channels
                self._hold(now)
                return
            self._hold_s = _HOLD_S[0]
        elif now < self._refused_until or (now < self._hold_until and not bound):
            return
        self._settled = (self.target, rate)
        self.target = min(self.most, self.target + max(1, self.target // 2))

    def _hold(self, now: float) -> None:
        self._hold_until = now + self._hold_s
        self._hold_s = min(2 * self._hold_s, _HOLD_S[1])


def _by_window(rate: float, channels: int, rtt_s: float | None) -> bool:
    """Tell whether it is the connections' windows that keep the rate down."""
    return rtt_s is not None and rate * rtt_s / channels > _WINDOW_SHARE * WINDOW_BYTES


def depth(rate: float, rtt_s: float | None) -> int:
    """Return how many bytes to ask for at once on a channel with this rate and round trip."""
    if rtt_s is None:
        return 2 * DEPTH_LEAST
    return int(min(DEPTH_MOST, max(DEPTH_LEAST, 2 * rate * rtt_s + DEPTH_LEAST / 2)))
