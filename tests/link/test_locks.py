"""Ctrl-C in the moment in which a lock is taken, and what the other threads see of it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kakehashi.link.locks import Condition, Event
from tests.lab.hosts import heeding_ctrl_c

ATTEMPTS = 20


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let no other thread of this process run Python code, unless this one waits."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def keep_busy(seconds: float) -> None:
    """Hold the interpreter, so that who has got a lock meanwhile waits for that."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def interrupted_while_it_takes(condition: threading.Condition) -> bool:
    """Return whether other threads can take it after a Ctrl-C in its taking."""
    me, held = threading.get_ident(), threading.Event()

    def hold() -> None:
        with condition:
            held.set()
            keep_busy(0.02)
            with alone():
                condition.release()
                keep_busy(0.01)
                signal.pthread_kill(me, signal.SIGINT)
                keep_busy(0.01)
            condition.acquire()

    def take() -> None:
        other.start()
        held.wait()
        with condition:
            pass
        other.join()

    other = threading.Thread(target=hold)
    with heeding_ctrl_c(), pytest.raises(KeyboardInterrupt):
        take()
    other.join(1)
    if not other.is_alive():
        return True
    condition.release()
    other.join()
    return False


def test_ctrl_c_leaves_a_condition_as_it_was() -> None:
    assert all(interrupted_while_it_takes(Condition()) for _ in range(ATTEMPTS))


def test_the_control_of_that_is_the_standard_condition() -> None:
    assert not all(interrupted_while_it_takes(threading.Condition()) for _ in range(ATTEMPTS))


def test_a_condition_is_woken_and_its_lock_excludes() -> None:
    condition, seen = Condition(), []

    def wait() -> None:
        with condition:
            condition.wait_for(lambda: bool(seen))
            seen.append("woken")

    other = threading.Thread(target=wait)
    other.start()
    with condition, condition:
        seen.append("told")
        condition.notify_all()
    other.join(20)
    assert seen == ["told", "woken"]
    with pytest.raises(RuntimeError):
        condition.notify_all()


@pytest.mark.parametrize("kind", [Event, threading.Event])
def test_an_event_is_as_the_standard_one(kind: Callable[[], Event]) -> None:
    event = kind()
    assert not event.is_set()
    assert not event.wait(0.01)
    other = threading.Thread(target=event.set)
    other.start()
    assert event.wait()
    assert event.wait(0)
    other.join()
    event.clear()
    assert not event.is_set()
    assert not event.wait(0)
