"""Work on a few threads, that can be called off; and how much one session may ask for."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from kakehashi.errors import RefusedError
from kakehashi.store.facets import Cancel

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")
_REMEMBERED = 10_000
_GRACE_S = 5.0


class CalledOffError(RefusedError):
    """Nobody waits for this work any more, or it took too long."""


class Job:
    """One piece of work; :meth:`call_off` makes it end soon, with `CalledOffError`.

    Attributes
    ----------
    cancel : Cancel
        What searches of the index look at.
    """

    def __init__(self) -> None:
        self.cancel = Cancel()
        self._reason: tuple[str, str] | None = None

    def call_off(self, code: str, message: str) -> None:
        """End it; the first reason counts."""
        self._reason = self._reason or (code, message)
        self.cancel.set()

    def is_over(self) -> bool:
        """Say whether it was called off."""
        return self._reason is not None

    def check(self) -> None:
        """Raise `CalledOffError` if it was called off."""
        if self._reason is not None:
            raise CalledOffError(*self._reason)


class Workers:
    """A few threads for what takes time; a scan lets others run while it is in C.

    Parameters
    ----------
    threads : int
    patience_s : float
        Seconds after which a piece of work is called off, waiting for a thread included.
    """

    def __init__(self, threads: int, patience_s: float) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="catalogue")
        self._patience_s = patience_s

    async def run(self, job: Job, work: Callable[[], _Result]) -> _Result:
        """Do some work on a thread.

        Raises
        ------
        CalledOffError
            Somebody called it off, or its time is over.
        """

        def step() -> _Result:
            job.check()  # it may have waited for long
            try:
                return work()
            finally:
                # An error of work that was called off is the calling off.
                job.check()

        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, step)
        # What was given up may still fail, and nobody is there to be told.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        reason = f"this took more than {self._patience_s:g} s; ask for less, or narrow the query"
        timer = loop.call_later(self._patience_s, job.call_off, "slow", reason)
        try:
            # A search ends when it is called off; what cannot end is not waited for.
            return await asyncio.wait_for(asyncio.shield(future), self._patience_s + _GRACE_S)
        except TimeoutError:
            job.check()
            raise
        finally:
            timer.cancel()

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Limiter:
    """How often, and how much at the same time, one session may ask.

    Parameters
    ----------
    per_second : float
        Requests a second in the long run.
    burst : int
        Requests at once after a rest.
    together : int
        Requests that may be under way at the same time.
    """

    def __init__(
        self,
        per_second: float,
        burst: int,
        together: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._together = together
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._running: dict[str, int] = {}

    def enter(self, session: str) -> None:
        """Count a request in; :meth:`leave` must follow if this returns.

        Raises
        ------
        RefusedError
            The session asks too often or too much; the code is ``limit``.
        """
        now = self._clock()
        left, then = self._left.pop(session, (float(self._burst), now))
        left = min(self._burst, left + (now - then) * self._per_second)
        running = self._running.get(session, 0)
        fine = left >= 1 and running < self._together
        self._left[session] = (left - 1 if fine else left, now)
        if len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)
        if not fine:
            raise RefusedError("limit", "this session asks too much at a time; wait a moment")
        self._running[session] = running + 1

    def leave(self, session: str) -> None:
        """Count a request out."""
        left = self._running[session] - 1
        if left:
            self._running[session] = left
        else:
            del self._running[session]
