"""What a process reads and waits for, noted by the second while it has something open.

A thread looks at the session's readers once a second. It ends when there are none left and no
loop waits, and begins anew with the next one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field, replace
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING

from kakehashi.link import tally
from kakehashi.link.session import Session
from kakehashi.link.tally import Moment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kakehashi.link.figures import Pulse, Second

    Look = Callable[[int], Pulse]

_LOOK_S = 1.0
# A little after the full second, so that it is over.
_AFTER_S = 0.02
# Longer between two looks is a machine that slept, and did not wait for bytes.
_LATE_S = 60


@dataclass(eq=False)
class _Watched:
    """A reader: what was counted of its last second, which may not be over."""

    look: Look
    at: int
    counted: Second | None = None


@dataclass(eq=False)
class _Wait:
    """A loop that waits: until when that was counted."""

    until: float


@dataclass(eq=False)
class Recorder:
    """Notes what one process does in one session."""

    tally: tally.Tally
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _watched: list[_Watched] = field(default_factory=list)
    _waits: list[_Wait] = field(default_factory=list)
    _thread: threading.Thread | None = None
    _asked: bool = False
    _whole: int = 0

    def watch(self, look: Look) -> None:
        """Note what a reader does, until it is closed."""
        with self._lock:
            self._watched.append(_Watched(look, int(time.time())))
            self._go()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Count a step of a loop, and how long it waited for its batch: the time in here."""
        wait = _Wait(time.time())
        with self._lock:
            self._waits.append(wait)
            self._go()
        steps = 0
        try:
            yield
            steps = 1
        finally:
            with self._lock:
                now = time.time()
                self._waited(wait, now)
                self._waits.remove(wait)
                if steps:
                    self.tally.add(Moment(int(now), steps=1))

    def note(self) -> None:
        """Count what was done up to now."""
        with self._lock:
            self._note(time.time())

    def _go(self) -> None:
        if self._thread is None:
            self._asked = False
            self._whole = int(time.time()) + 1
            self._thread = threading.Thread(target=self._run, name="kakehashi-traffic", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        idle = threading.Event()
        while True:
            idle.wait(_LOOK_S - time.time() % _LOOK_S + _AFTER_S)
            with self._lock:
                self._note(time.time())
                if not self._watched and not self._waits:
                    self._thread = None
                    return

    def _note(self, now: float) -> None:
        asked = False
        for one in list(self._watched):
            pulse = one.look(one.at)
            asked |= pulse.asked and not pulse.closed
            for second in pulse.seconds:
                self._read(one, second, pulse.rtt_s)
            if pulse.closed:
                self._watched.remove(one)
        for wait in self._waits:
            self._waited(wait, now)
        self._stalls(int(now), asked=asked)

    def _read(self, one: _Watched, second: Second, rtt_s: float) -> None:
        before = one.counted if one.counted is not None and one.counted.at == second.at else None
        # Less than before: the machine's clock was set back, to a second that was once.
        if before is not None and before.bytes > second.bytes:
            before = None
        new = Moment(
            second.at,
            bytes=second.bytes - (before.bytes if before else 0),
            rereads=max(0, second.rereads - (before.rereads if before else 0)),
            reconnects=max(0, second.reconnects - (before.reconnects if before else 0)),
        )
        # A reader that is idle is no traffic, and its round trip is one of earlier times.
        if new != Moment(second.at):
            self.tally.add(replace(new, channels=second.channels, rtt_s=rtt_s))
        one.at, one.counted = second.at, second

    def _waited(self, wait: _Wait, now: float) -> None:
        """Count a wait in the seconds in which it was."""
        # It is looked at every second, unless the machine slept, or its clock was set.
        wait.until = max(wait.until, now - _LATE_S)
        while wait.until < now:
            at = int(wait.until)
            end = min(now, at + 1.0)
            self.tally.add(Moment(at, waited_s=end - wait.until))
            wait.until = end

    def _stalls(self, now: int, *, asked: bool) -> None:
        """Tell, for the seconds that are over, whether bytes were asked for and whether they came.

        Asked at its beginning and its end, is asked all the time.
        """
        for at in range(max(self._whole, now - _LATE_S), now):
            if self.tally.second(at).bytes:
                self.tally.add(Moment(at, asked_s=1.0))
            elif asked and self._asked:
                self.tally.add(Moment(at, asked_s=1.0, stalled_s=1.0))
        self._asked = asked
        self._whole = max(self._whole, now)


_recorders: dict[tuple[str, Path | None], Recorder] = {}
_lock = threading.Lock()


def of(session: Session) -> Recorder:
    """Return this process's recorder for a session."""
    key = (session.session, tally.shared_folder(session.session))
    with _lock:
        recorder = _recorders.get(key)
        if recorder is None:
            recorder = _recorders[key] = Recorder(tally.begin(key[1]))
            # Also run at the end of a worker process, which atexit is not.
            Finalize(recorder, recorder.note, exitpriority=10)
        return recorder


def step(session: Session | Path | str | None = None) -> contextlib.AbstractContextManager[None]:
    """Mark a step of a training loop in the session's traffic: the time in here is its wait.

    A :class:`~kakehashi.link.SeriesLoader` does so by itself.

    Parameters
    ----------
    session : Session, Path or str, optional
        As for :class:`kakehashi.link.Store`.

    Examples
    --------
    >>> for number in range(steps):  # doctest: +SKIP
    ...     with step():
    ...         batch = next(batches)
    ...     train(batch)
    """
    return of(Session.of(session)).step()


def _after_fork() -> None:
    # The memory is the parent's to write, and its threads are not here.
    global _lock  # noqa: PLW0603 - it may have been held by a thread that does not exist here
    _lock = threading.Lock()
    for recorder in _recorders.values():
        recorder.tally.close()
    _recorders.clear()


os.register_at_fork(after_in_child=_after_fork)
