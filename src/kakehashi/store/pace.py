"""Keep reading so slow that those who work with the store do not notice it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Pace:
    """Keeps reading to a rate: a bucket that holds the bytes of one second.

    Parameters
    ----------
    rate : float or None
        Bytes a second; None for as fast as it goes.
    clock, sleep : callable
        Seconds of a clock that only goes forward; and how to wait.

    Attributes
    ----------
    taken : int
        Bytes so far.
    """

    def __init__(
        self,
        rate: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.taken = 0
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._level = rate or 0.0
        self._filled = clock()

    def take(self, count: int) -> None:
        """Take note of bytes that were read, and wait if they were too many."""
        self.taken += count
        if self._rate is None:
            return
        now = self._clock()
        self._level = min(self._rate, self._level + (now - self._filled) * self._rate) - count
        self._filled = now
        if self._level < 0:
            self._sleep(-self._level / self._rate)
