"""Calls to the store that must be made in the end, in their order, also if it is silent now."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from tornado.log import app_log

from kakehashi.errors import RefusedError, SiteError, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# At some hundred bytes each; a store that is away for that many events needs a person.
LONGEST = 10_000


class Outbox:
    """A queue of calls, each repeated until it is answered.

    It lives in memory: what the hub has not delivered when it dies is lost, and the store then
    ends the session by its lease.
    """

    def __init__(self) -> None:
        self._calls: deque[tuple[str, Callable[[], Awaitable[object]]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    def add(self, what: str, call: Callable[[], Awaitable[object]]) -> None:
        """Queue a call.

        Parameters
        ----------
        what : str
            Goes into the log where the call fails.
        call : callable
            Makes a new awaitable each time.
        """
        if len(self._calls) >= LONGEST:
            app_log.error("the outbox to the store is full; dropped: %s", what)
            return
        self._calls.append((what, call))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())

    async def _work(self) -> None:
        pause = FIRST_PAUSE_S
        while self._calls:
            what, call = self._calls[0]
            try:
                await call()
            except (StoreError, SiteError) as error:
                app_log.warning("%s: %s; trying again in %.1f s", what, error, pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            except RefusedError as error:
                app_log.warning("%s: refused (%s): %s", what, error.code, error)
            except Exception:
                # One broken call must not keep all the later ones from being made.
                app_log.exception("%s: failed", what)
            pause = FIRST_PAUSE_S
            self._calls.popleft()
