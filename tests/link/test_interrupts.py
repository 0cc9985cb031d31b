"""Ctrl-C at the worst moments: what comes behind it goes on as if there had been none."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kakehashi.link import Reader, Saver, ring
from kakehashi.link.channels import Channels
from kakehashi.link.checkpoint import Saving
from kakehashi.link.locks import Condition, Event, Uninterrupted
from kakehashi.link.pool import Pool
from kakehashi.link.workchannel import ChannelFolder
from tests.lab.hosts import heeding_ctrl_c, wait_for
from tests.link.stores import BLOCK, Server, StoreFolder, random_bytes

SERVER_WRITES = True

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
    lost = condition._is_owned()
    while condition._is_owned():
        condition.release()
    other.join()
    return not lost


def interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupting(function: Callable[..., object], times: int = 1) -> Callable[..., object]:
    """Return a function that is interrupted where it begins, the first times."""
    left = iter(range(times))

    def instead(*args: object, **options: object) -> object:
        if next(left, None) is not None:
            interrupt()
        return function(*args, **options)

    return instead


# Locks.


@pytest.mark.parametrize("of", [Condition, lambda: Saving("a")._condition], ids=["own", "future"])
def test_ctrl_c_leaves_a_condition_as_it_was(of: Callable[[], threading.Condition]) -> None:
    assert all(interrupted_while_it_takes(of()) for _ in range(ATTEMPTS))


def test_the_control_of_that_is_the_standard_condition() -> None:
    assert not all(interrupted_while_it_takes(threading.Condition()) for _ in range(ATTEMPTS))


def test_a_condition_lets_one_in_at_a_time_and_wakes_who_waits() -> None:
    condition, seen, waits = Condition(), [], threading.Event()

    def wait() -> None:
        with condition:
            waits.set()
            condition.wait_for(lambda: bool(seen))
            seen.append("woken")

    other = threading.Thread(target=wait)
    other.start()
    assert waits.wait(60)
    # Only when it waits can this come in.
    with condition, condition:
        seen.append("told")
        condition.notify_all()
        other.join(0.1)
        assert seen == ["told"]
    other.join(60)
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


@pytest.mark.parametrize("depth", [1, 2])
def test_what_must_be_whole_is_done_before_ctrl_c_is_raised(depth: int) -> None:
    done = []

    def work() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(depth):
                stack.enter_context(Uninterrupted())
            interrupt()
            done.append("whole")
        done.append("too much")

    with heeding_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            work()
        assert done == ["whole"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_ignores_ctrl_c_or_is_another_thread_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Uninterrupted():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen: list[object] = []

    def look() -> None:
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    other = threading.Thread(target=look)
    other.start()
    other.join()
    assert seen == [before]


# What stands on them.


def test_a_read_that_is_interrupted_while_it_is_queued_holds_up_no_other(
    folder: StoreFolder, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_bytes(40 * BLOCK)
    path = folder.add("1.2.3", data)
    with (
        heeding_ctrl_c(),
        Reader.connect(
            server, manifest_path=folder.manifest_path, sha256=folder.sha256, channels=3
        ) as reader,
        reader.open(path) as file,
    ):
        monkeypatch.setattr(Pool, "_call", interrupting(Pool._call))
        with pytest.raises(KeyboardInterrupt):
            file.read(0, len(data))
        assert file.read(0, len(data)) == data


def test_a_save_that_is_interrupted_where_it_begins_holds_up_no_other(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Saver._begin

    def begun(*args: object) -> None:
        begin(*args)
        interrupt()
        monkeypatch.undo()

    monkeypatch.setattr(Saver, "_begin", begun)
    with (
        heeding_ctrl_c(),
        ChannelFolder(server, root=str(root)) as work,
        Saver(work=work) as saver,
    ):
        with pytest.raises(KeyboardInterrupt):
            saver.save("a", b"given up")
        saver.save("b", b"goes on").result(60)
        assert saver.held == 0
    assert not (root / "a").exists()
    assert (root / "b").read_bytes() == b"goes on"


def test_who_is_interrupted_while_a_channel_is_given_back_costs_no_channel(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a").write_bytes(b"there")
    with heeding_ctrl_c(), ChannelFolder(server, root=str(root)) as work:
        monkeypatch.setattr(Channels, "give_back", interrupting(Channels.give_back, 8))
        kept = []
        for _ in range(8):
            with pytest.raises(KeyboardInterrupt) as caught:
                work.read("a")
            kept.append(caught)
        assert work.read("a") == b"there"


class Number:
    def __init__(self, number: int) -> None:
        self.number = number

    def size(self) -> int:
        return 1

    def load(self) -> int:
        return self.number


def test_a_stream_that_is_interrupted_where_it_begins_takes_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            interrupt()

    monkeypatch.setattr(ring, "threading", SimpleNamespace(Thread=Interrupted))
    room = ring.Ring(4)
    items = [Number(number) for number in range(8)]
    with heeding_ctrl_c(), pytest.raises(KeyboardInterrupt):
        room.stream(items, threads=2)
    wait_for("the room to be free", lambda: room.stats().held_bytes == 0)
    monkeypatch.undo()
    with room.stream(items, threads=2) as stream:
        assert list(stream) == list(range(8))
