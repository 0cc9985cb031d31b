"""Keeping the lease: renewal in the background, and what is told of it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kakehashi.errors import RefusedError, SessionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi.session.hubclient import Grant, HubClient
    from kakehashi.session.keys import SigningKey

# The store's view of a lease may lag by a request; a third leaves two more tries in it.
PARTS = 3
SHORTEST_S = 0.05
FIRST_RETRY_S = 1.0
# So soon a session goes on after an outage that was longer than its lease.
LAST_RETRY_S = 5.0


@dataclass(frozen=True)
class News:
    """What became of the lease: a new grant, no answer, or the right lost for good."""

    kind: Literal["renewed", "offline", "lost"]
    message: str = ""
    grant: Grant | None = None


class Renewer:
    """Renews the lease at every third of its length, in a thread of its own.

    Parameters
    ----------
    hub : HubClient
    key : SigningKey
    grant : Grant
        The first one.
    offline_max_s : float
        How long the session may go on while the portal does not answer, seconds.
    tell : callable
        Gets each :class:`News`, in the thread of the renewer.
    """

    def __init__(
        self,
        hub: HubClient,
        key: SigningKey,
        grant: Grant,
        offline_max_s: float,
        tell: Callable[[News], None],
    ) -> None:
        self._hub = hub
        self._key = key
        self._grant = grant
        self._offline_max_s = offline_max_s
        self._tell = tell
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more; a request under way is not waited for."""
        self._stopped.set()

    def _work(self) -> None:
        counter = 0
        heard = time.monotonic()
        retry = 0.0
        while not self._stopped.wait(retry or max(self._grant.lease_s / PARTS, SHORTEST_S)):
            counter += 1
            try:
                self._grant = self._hub.renew(self._key, counter)
            except RefusedError as error:
                self._tell(News("lost", str(error)))
                return
            except SessionError as error:
                if time.monotonic() - heard >= self._offline_max_s:
                    self._tell(
                        News(
                            "lost",
                            f"the portal has not answered for {self._offline_max_s:.0f} s, "
                            "the longest that this site allows",
                        )
                    )
                    return
                left = self._offline_max_s - (time.monotonic() - heard)
                retry = min(max(FIRST_RETRY_S, 2 * retry), LAST_RETRY_S, max(left, 0.05))
                self._tell(News("offline", str(error)))
            else:
                heard = time.monotonic()
                retry = 0.0
                self._tell(News("renewed", grant=self._grant))
