"""Locks that a Ctrl-C does not leave taken, and work that it does not leave half done.

``with`` on a :class:`threading.Condition` runs a Python function that takes the lock. Where the
thread must wait for the lock, or for the interpreter behind it, and is interrupted meanwhile, the
exception is raised in that function: the lock is taken, and nothing gives it back. All that the
link's threads do then stands still. In a notebook Ctrl-C is a matter of course, and a busy node
makes the waiting long. A plain lock is safe: its ``with`` runs no Python code.
"""

from __future__ import annotations

import signal
import threading
from operator import attrgetter
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


class Uninterrupted:
    """``with Uninterrupted():`` has a Ctrl-C that comes in it raised at its end.

    For what is short, and must be done in whole: nothing that waits for the store. Ctrl-C is
    raised in the main thread only, so that elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self._before: Callable[[int, FrameType | None], object] | None = None
        self._came: FrameType | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        signal.signal(signal.SIGINT, self._before)
        if self._came is not None:
            self._before(signal.SIGINT, self._came)

    def _note(self, _: int, frame: FrameType | None) -> None:
        self._came = frame


class Condition(threading.Condition):
    """A condition on a lock of its own, which the same thread may take again."""

    def __init__(self) -> None:
        # Of this kind, since waiting for it again, after being woken, runs no Python code either.
        self._mine = threading.RLock()
        super().__init__(self._mine)

    # `with` asks the class for these two and calls what they give: the lock's own methods.

    __enter__ = property(attrgetter("_mine.__enter__"))
    __exit__ = property(attrgetter("_mine.__exit__"))


class Event:
    """Something that one thread waits for, and clears before it waits again."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._is_set = False

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Wake the thread that waits, or let it not wait."""
        with self._changed:
            self._is_set = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Have the next waiting wait for another one."""
        with self._changed:
            self._is_set = False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set, and return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_set, timeout_s)
