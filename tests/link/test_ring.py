"""The ring in memory: order, bound, waiting, errors and endings, without a store under it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakehashi.errors import LinkClosedError
from kakehashi.link import Ring
from kakehashi.link.ring import _MOST_AHEAD
from tests.lab.hosts import wait_for

SECONDS = 20


@dataclass
class Watch:
    """Counts, from the items' side, what a ring holds and loads."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    loads: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def loaded(self, number: int) -> None:
        with self.lock:
            self.loads.append(number)
            self.threads.add(threading.current_thread().name)


@dataclass
class Thing:
    number: int
    bytes: int
    watch: Watch = field(default_factory=Watch)
    gate: threading.Event | None = None
    fails: bool = False

    def size(self) -> int:
        return self.bytes

    def load(self) -> int:
        if self.gate is not None:
            assert self.gate.wait(SECONDS)
        self.watch.loaded(self.number)
        if self.fails:
            raise ValueError(f"item {self.number}")
        return self.number


@settings(max_examples=80)
@given(
    sizes=st.lists(st.integers(0, 150), max_size=40),
    capacity=st.integers(1, 100),
    threads=st.integers(1, 4),
)
def test_whatever_the_sizes_all_come_in_order_and_the_bound_holds(
    sizes: list[int], capacity: int, threads: int
) -> None:
    ring, watch = Ring(capacity), Watch()
    with ring.stream([Thing(n, s, watch) for n, s in enumerate(sizes)], threads=threads) as stream:
        assert list(stream) == list(range(len(sizes)))
        assert stream.join(SECONDS)
    stats = ring.stats()
    assert sorted(watch.loads) == list(range(len(sizes))), "each is loaded once"
    assert stats.peak_bytes <= capacity
    assert stats.held_bytes == 0
    assert stats.prefetched + stats.read_through == len(sizes)
    assert stats.evicted == stats.prefetched
    assert stats.read_through >= sum(size > capacity for size in sizes)


def test_it_fetches_ahead_up_to_its_bound_and_no_further() -> None:
    ring, watch = Ring(30), Watch()
    with ring.stream(Thing(n, 10, watch) for n in itertools.count()) as stream:
        wait_for("items fetched ahead", lambda: ring.stats().prefetched == 3)
        assert ring.stats().held_bytes == 30
        assert next(stream) == 0
        wait_for("items fetched ahead", lambda: ring.stats().prefetched == 4)
        assert sorted(watch.loads) == [0, 1, 2, 3]
        assert ring.stats().waited == 0
        assert ring.stats().evicted == 1
    assert ring.stats().held_bytes == 0


def test_an_item_larger_than_the_ring_is_read_through_while_the_next_ones_are_fetched() -> None:
    ring, watch = Ring(20), Watch()
    things = [Thing(0, 21, watch), Thing(1, 10, watch), Thing(2, 10, watch)]
    with ring.stream(things) as stream:
        wait_for("items fetched ahead", lambda: ring.stats().prefetched == 2)
        assert 0 not in watch.loads
        assert list(stream) == [0, 1, 2]
        assert ring.stats().read_through == 1


def test_items_without_a_size_are_not_taken_without_end() -> None:
    ring, pulled = Ring(10), itertools.count()
    things = (Thing(next(pulled), 11) for _ in itertools.count())
    with ring.stream(things, threads=4) as stream:
        assert next(stream) == 0
        wait_for("all that is looked at ahead", lambda: len(stream._slots) >= _MOST_AHEAD)
        assert next(pulled) <= _MOST_AHEAD + 8


def test_waiting_is_blocking_and_is_counted() -> None:
    ring, gate = Ring(10), threading.Event()
    with (
        ring.stream([Thing(0, 5, gate=gate)]) as stream,
        ThreadPoolExecutor(1) as pool,
    ):
        wait_for("bytes held", lambda: ring.stats().held_bytes == 5)
        asked = pool.submit(next, stream)
        wait_for("somebody who waits", lambda: ring.stats().waited == 1)
        started = time.monotonic()
        before = time.process_time()
        threading.Event().wait(0.5)
        assert not asked.done()
        assert time.process_time() - before < 0.1, "it does not poll"
        gate.set()
        assert asked.result(SECONDS) == 0
    assert ring.stats().waited_s >= 0.5
    assert ring.stats().waited_s <= time.monotonic() - started + 1


def test_an_item_that_fails_says_so_in_its_turn_and_the_next_ones_come() -> None:
    ring = Ring(100)
    things = [Thing(0, 1), Thing(1, 1, fails=True), Thing(2, 200, fails=True), Thing(3, 1)]
    with ring.stream(things) as stream:
        assert next(stream) == 0
        with pytest.raises(ValueError, match="item 1"):
            next(stream)
        with pytest.raises(ValueError, match="item 2"):
            next(stream)
        assert next(stream) == 3
        with pytest.raises(StopIteration):
            next(stream)
    assert ring.stats().held_bytes == 0


def test_an_order_that_breaks_is_an_error_and_not_an_end() -> None:
    def broken() -> Iterator[Thing]:
        yield Thing(0, 1)
        raise ZeroDivisionError("the order")

    with Ring(10).stream(broken()) as stream:
        assert next(stream) == 0
        with pytest.raises(ZeroDivisionError, match="the order"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_a_size_that_cannot_be_known_is_the_items_error() -> None:
    class Bad(Thing):
        def size(self) -> int:
            raise OSError("no directory")

        def load(self) -> int:
            raise OSError("no directory")

    with Ring(10).stream([Bad(0, 1), Thing(1, 1)]) as stream:
        with pytest.raises(OSError, match="no directory"):
            next(stream)
        assert next(stream) == 1


def test_threads_share_a_stream_without_loss_or_repetition() -> None:
    ring = Ring(50)
    with ring.stream([Thing(n, n % 30) for n in range(300)], threads=3) as stream:
        with ThreadPoolExecutor(4) as pool:
            parts = [pool.submit(list, stream) for _ in range(4)]
            got = [part.result(SECONDS) for part in parts]
        assert sorted(itertools.chain(*got)) == list(range(300))
        assert all(part == sorted(part) for part in got)


def test_streams_share_a_ring_and_one_that_nobody_reads_does_not_stop_the_other() -> None:
    ring = Ring(30)
    with (
        ring.stream([Thing(n, 10) for n in range(100)]) as idle,
        ring.stream([Thing(n, 10) for n in range(100)]) as busy,
    ):
        wait_for("bytes held", lambda: ring.stats().held_bytes == 30)
        assert list(busy) == list(range(100))
        assert list(idle) == list(range(100))
    assert ring.stats().peak_bytes <= 30
    assert ring.stats().held_bytes == 0


def test_closing_drops_what_is_held_and_ends_whoever_waits() -> None:
    ring, gate = Ring(20), threading.Event()
    stream = ring.stream([Thing(0, 10, gate=gate), Thing(1, 10), Thing(2, 10)])
    with ThreadPoolExecutor(1) as pool:
        wait_for("items fetched ahead", lambda: ring.stats().prefetched == 1)
        asked = pool.submit(next, stream)
        wait_for("somebody who waits", lambda: ring.stats().waited == 1)
        stream.close()
        with pytest.raises(LinkClosedError, match="closed"):
            asked.result(SECONDS)
    with pytest.raises(LinkClosedError, match="closed"):
        next(stream)
    assert not stream.join(0), "the load under way is not cut off by this"
    assert ring.stats().held_bytes == 10
    gate.set()
    assert stream.join(SECONDS)
    assert ring.stats().held_bytes == 0, "what it brought is dropped"
    with ring.stream([Thing(7, 20)]) as other:
        assert list(other) == [7]


def test_nothing_is_written_to_a_disk(tmp_path: object) -> None:
    import sys

    opened: list[str] = []
    recording = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        if recording and event == "open":
            opened.append(str(args[0]))

    sys.addaudithook(hook)
    try:
        with Ring(30).stream([Thing(n, 10) for n in range(50)]) as stream:
            assert list(stream) == list(range(50))
            assert stream.join(SECONDS)
        assert opened == []
        with open("/dev/null") as _:  # noqa: PTH123 - the control: the hook hears what opens
            assert opened == ["/dev/null"]
    finally:
        recording = False


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_ring_without_room_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        Ring(capacity)
