"""Locks that a Ctrl-C leaves as they were.

``with`` on a :class:`threading.Condition` runs a Python function that takes the lock. Where the
thread must wait for the lock, or for the interpreter behind it, and is interrupted meanwhile, the
exception is raised in that function: the lock is taken, and nothing gives it back. All that the
link's threads do then stands still. In a notebook Ctrl-C is a matter of course, and a busy node
makes the waiting long. A plain lock is safe: its ``with`` runs no Python code.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Condition(threading.Condition):
    """A condition on a lock of its own, which the same thread may take again."""

    def __init__(self) -> None:
        # Waiting ends with this kind of lock taken, whatever interrupts it.
        self._mine = threading.RLock()
        super().__init__(self._mine)

    # `with` asks the class for these two and calls what they give: the lock's own methods.

    @property
    def __enter__(self) -> Callable[[], bool]:
        return self._mine.__enter__

    @property
    def __exit__(self) -> Callable[..., None]:  # noqa: PLE0302 - what it returns takes the three
        return self._mine.__exit__


class Event:
    """As :class:`threading.Event`."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._is_set = False

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._is_set = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Have those wait who come from now on."""
        with self._changed:
            self._is_set = False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set, and return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_set, timeout_s)
