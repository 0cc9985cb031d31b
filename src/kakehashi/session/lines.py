"""Which of the store's addresses the next channel goes to.

A store with several lines to a site has an address on each of them, for one and the same sshd.
Channels are spread over them evenly; one whose channels fail gets no new ones for a while.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REST_S = 10.0
"""For how long an address on which a channel failed is left alone while there are others."""


class Lines:
    """The addresses, and the channels to each.

    Parameters
    ----------
    addresses : sequence of str
        At least one; where all else is equal the first is taken first.
    clock : callable, optional
        Seconds of a clock that only goes forward.
    """

    def __init__(
        self, addresses: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._addresses = tuple(dict.fromkeys(addresses))
        self._clock = clock
        self._failed: dict[str, float] = {}
        self._channels: dict[int, str] = {}

    def choose(self) -> str:
        """Return where to open a channel: where there are fewest, of those that did not fail."""
        now = self._clock()
        used = list(self._channels.values())

        def rank(address: str) -> tuple[float, int]:
            failed = self._failed.get(address, -REST_S)
            return failed if now - failed < REST_S else -REST_S, used.count(address)

        return min(self._addresses, key=rank)

    def opened(self, pid: int, address: str) -> None:
        """Note the process of a channel."""
        self._channels[pid] = address

    def ended(self, pid: int, *, failed: bool) -> None:
        """Note its end, and whether it was the line's fault."""
        address = self._channels.pop(pid, None)
        if address is not None and failed:
            self._failed[address] = self._clock()
