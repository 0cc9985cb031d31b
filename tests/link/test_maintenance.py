"""Going on from memory while the store is shut: order, bytes, losses, and when memory is freed."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import gc
import json
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.errors import (
    BlockMismatchError,
    LinkClosedError,
    LinkError,
    SessionError,
)
from kakehashi.link import (
    Estimate,
    Maintenance,
    Pins,
    Position,
    Reader,
    SeriesDataset,
    SeriesLoader,
    pin,
    pinned,
    plan,
    position_at,
)
from kakehashi.link.maintenance import turned
from kakehashi.link.order import Order, Turned
from kakehashi.session import watch
from kakehashi.session.hubclient import Grant, HubClient
from kakehashi.session.keeper import Keeper
from kakehashi.session.keys import SigningKey
from tests.lab.hosts import LabError, wait_for
from tests.link.volumes import Cohort, uid

SHAPES = [(20, 40, 36), (24, 32, 40), (16, 48, 32), (20, 36, 36), (18, 40, 40), (22, 34, 38)]
CROP = (4, 8, 8)
CROP_BYTES = 4 * 8 * 8 * 4
PER_SERIES = 4
COUNT = PER_SERIES * len(SHAPES)
BIG = 1 << 30
PINNED = tuple(uid(n) for n in (0, 2, 4))
START = Position(0, 6)
NOW = dt.datetime(2031, 1, 1, tzinfo=dt.UTC)


@pytest.fixture
def cohort(tmp_path: Path) -> Iterator[Cohort]:
    cohort = Cohort(tmp_path / "cohort", SHAPES)
    lease(cohort)
    yield cohort
    cohort.broker.send(signal.SIGCONT)
    cohort.close()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The series are so small that the reader would keep them all, and no cut would be felt.
    monkeypatch.setitem(cast("dict[str, Any]", Reader.__init__.__kwdefaults__), "cache_bytes", 1)
    monkeypatch.setattr(pinned, "_WATCH_S", 0.02)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lease(cohort: Cohort, **changes: str) -> None:
    now = dt.datetime.now(dt.UTC)
    data = {
        "expires_at": (now + dt.timedelta(minutes=15)).isoformat(),
        "ends_at": (now + dt.timedelta(hours=8)).isoformat(),
        "state": "live",
        "message": "",
    }
    part = cohort.path.with_name("lease.part")
    part.write_text(json.dumps(data | changes), encoding="utf-8")
    part.replace(cohort.path.with_name("lease.json"))


@contextlib.contextmanager
def shut(cohort: Cohort, how: str = "silent") -> Iterator[Callable[[], None]]:
    """Shut the store: it does not answer, or it refuses; channels opened meanwhile as well.

    Gives what opens it again.
    """
    broker = cohort.broker
    serving = broker._command
    broker._command = ["/bin/sleep", "600"] if how == "silent" else ["/bin/false"]
    broker.send(signal.SIGSTOP if how == "silent" else signal.SIGKILL)

    def reopen() -> None:
        if broker._command is not serving:
            broker._command = serving
            broker.send(signal.SIGKILL)

    try:
        yield reopen
    finally:
        reopen()


def made(cohort: Cohort, **more: Any) -> SeriesLoader:
    dataset = SeriesDataset(cohort.path, crop=CROP, per_series=PER_SERIES, seed=3)
    return SeriesLoader(dataset, **({"batch_size": 2, "ring_bytes": 2 * CROP_BYTES} | more))


class Training:
    """A loop with a small network; what it saw, and every loss to the bit."""

    def __init__(self, loader: SeriesLoader) -> None:
        self.loader = loader
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(
            torch.nn.Conv3d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 1)
        )
        self.sgd = torch.optim.SGD(self.net.parameters(), 1e-2, momentum=0.9)
        self.seen: list[list[int]] = []
        self.losses: list[str] = []

    def run(self, until: Position) -> None:
        while self.loader.position < until:
            for batch in self.loader:
                image = batch["image"] / 1000
                self.sgd.zero_grad()
                loss = (self.net(image) - image.mean((1, 2, 3, 4))[:, None]).square().mean()
                loss.backward()
                self.sgd.step()
                self.seen.append(batch["sample"].tolist())
                self.losses.append(loss.item().hex())
                if self.loader.position >= until:
                    break

    @property
    def result(self) -> tuple[list[list[int]], list[str]]:
        return self.seen, self.losses


def held_end(loader: SeriesLoader) -> int:
    """Return the position behind the last batch of two of which all is held."""
    stop = loader.order(START.epoch).held[-1].stop
    return stop - stop % 2


ANNOUNCED = Maintenance(*START, PINNED)
END = Position(2, 4)


@pytest.fixture
def undisturbed(cohort: Cohort) -> tuple[list[list[int]], list[str]]:
    """The same schedule, announced, and nothing happens; not even pinned."""
    with made(cohort) as loader:
        loader.announce(ANNOUNCED)
        training = Training(loader)
        training.run(END)
    assert len(set(training.losses)) == len(training.losses)
    return training.result


# --- the order ---------------------------------------------------------------------------------


@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_a_turned_epoch_is_what_sorting_a_list_gives(
    count: int, seed: int, data: st.DataObject
) -> None:
    order = Order(count, seed, 1)
    starts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    samples = st.sets(st.integers(0, count - 1))
    announced = [(start, data.draw(samples)) for start in starts]
    expected = [order.sample(p) for p in range(count)]
    held = []
    for start, among in announced:
        rest = expected[start:]
        first = [n for n in rest if n in among]
        expected = expected[:start] + first + [n for n in rest if n not in among]
        held.append(range(start, start + len(first)))
    made = Turned(order, announced)
    assert [made.sample(p) for p in range(count)] == expected
    assert sorted(expected) == list(range(count))
    assert [made.position(n) for n in expected] == list(range(count))
    assert made.held == tuple(held)


def test_an_epoch_has_no_place_behind_its_end() -> None:
    order = Order(5, 0, 0)
    assert Turned(order, [(5, [1])]).held == (range(5, 5),)
    with pytest.raises(IndexError, match="from position 6 on; the epoch has 5"):
        Turned(order, [(6, [])])
    with pytest.raises(IndexError):
        Turned(order, [(2, [1])]).sample(5)
    with pytest.raises(IndexError):
        Turned(order, [(2, [5])])


def test_all_samples_of_a_series_are_turned_and_holding_everything_turns_nothing() -> None:
    order = Order(6, 1, 0)
    plain = [order.sample(p) for p in range(6)]
    some = turned(order, ["a", "b"], 3, [Maintenance(0, 2, ("b",))])
    rest = [n for n in plain[2:] if n >= 3] + [n for n in plain[2:] if n < 3]
    assert [some.sample(p) for p in range(6)] == plain[:2] + rest
    everything = turned(order, ["a", "b"], 3, [Maintenance(0, 2, ("b", "a"))])
    assert [everything.sample(p) for p in range(6)] == plain
    assert everything.held == ()


def test_only_the_epoch_that_it_was_announced_for_is_turned(cohort: Cohort) -> None:
    with made(cohort) as loader:
        loader.announce(ANNOUNCED)
        seen = [[n for batch in loader for n in batch["sample"].tolist()] for _ in range(3)]
        orders = [loader.dataset.order(epoch) for epoch in range(3)]
    plain = [[order.sample(p) for p in range(COUNT)] for order in orders]
    assert seen[1:] == plain[1:]
    assert seen[0] != plain[0]
    numbers = {int(one.rsplit(".", 1)[1]) for one in PINNED}
    rest = plain[0][START.sample :]
    expected = [n for n in rest if n // PER_SERIES in numbers]
    expected += [n for n in rest if n // PER_SERIES not in numbers]
    assert seen[0] == plain[0][: START.sample] + expected


# --- the outage --------------------------------------------------------------------------------

KINDS = [
    (0, None, "silent"),
    (0, None, "refusing"),
    (2, "fork", "refusing"),
    (2, "spawn", "silent"),
]


@pytest.mark.parametrize(("workers", "method", "how"), KINDS)
def test_the_loop_goes_through_an_outage_and_the_losses_are_the_same(
    cohort: Cohort,
    undisturbed: tuple[list[list[int]], list[str]],
    workers: int,
    method: str | None,
    how: str,
) -> None:
    with made(cohort, num_workers=workers, start_method=method) as loader:
        training = Training(loader)
        training.run(Position(0, 2))
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
        assert pins.wait(30)
        if method != "spawn":
            loader.announce(ANNOUNCED, pins)
        training.run(START)
        with shut(cohort, how) as reopen, ThreadPoolExecutor(1) as pool:
            if method == "spawn":
                # In time as well, and what is spawned now has no cache of what it had read.
                loader.announce(ANNOUNCED, pins)
            end = held_end(loader)
            assert end - START.sample >= 8
            # The loop stays in this thread, as torch has its number of threads for each.
            waiting = pool.submit(until_used_up, loader, reopen)
            training.run(Position(0, end))
            assert loader.stats().used_up_s == 0
            training.run(END)
            assert waiting.result(30) < end + 2 * (2 * workers + 3), "no more than was under way"
        assert loader.stats().used_up_s > 0.3
    assert training.result == undisturbed


def until_used_up(loader: SeriesLoader, reopen: Callable[[], None]) -> int:
    """Open the store when the loop has stood still; return where that was."""
    try:
        wait_for("a wait for the store", lambda: loader.stats().used_up_s > 0.3)
        return loader.position.sample
    finally:
        reopen()


def test_without_pins_the_outage_is_felt_at_once(cohort: Cohort) -> None:
    """The control of the test above."""
    with made(cohort) as loader:
        training = Training(loader)
        loader.announce(ANNOUNCED)
        training.run(START)
        with ThreadPoolExecutor(1) as pool:
            with shut(cohort):
                further = pool.submit(training.run, Position(0, held_end(loader)))
                with pytest.raises(TimeoutError):
                    further.result(1)
                assert loader.position.sample <= START.sample + 6
            further.result(30)


def test_what_is_used_up_is_told_once(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kakehashi.link.dataset._TELL_S", 0.0)
    with made(cohort) as loader:
        training = Training(loader)
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
        pins.wait()
        loader.announce(ANNOUNCED, pins)
        training.run(START)
        with ThreadPoolExecutor(1) as pool:
            with shut(cohort):
                further = pool.submit(training.run, END)
                wait_for("the message", lambda: "is used up" in caplog.text)
            further.result(30)
    (told,) = [one for one in caplog.records if "used up" in one.message]
    assert "from epoch 0, sample 6 on" in told.message
    assert "goes on by itself" in told.message


def test_two_ranks_hold_their_own_share_and_have_every_sample_once(cohort: Cohort) -> None:
    loaders = [made(cohort, rank=rank, world=2, batch_size=1) for rank in range(2)]
    got: list[list[int]] = [[], []]

    def steps(count: int) -> None:
        for rank, loader in enumerate(loaders):
            batches = iter(loader)
            got[rank] += [int(next(batches)["sample"]) for _ in range(count)]
            batches.close()  # type: ignore[attr-defined] # a generator

    steps(2)
    sizes = {one: len(cohort.folder.contents[f"series/{one}.ozx"]) for one in cohort.uids}
    estimates = [plan(one, START, limit_bytes=sum(sizes.values()) // 2) for one in loaders]
    maintenance = estimates[0].maintenance
    assert all(one.maintenance == maintenance for one in estimates)
    assert 0 < len(maintenance.uids) < len(SHAPES)
    every = [pin(one, maintenance, limit_bytes=estimates[0].limit_bytes) for one in loaders]
    for loader, pins, estimate in zip(loaders, every, estimates, strict=True):
        pins.wait()
        assert pins.progress().bytes == estimate.bytes <= estimate.limit_bytes
        loader.announce(maintenance, pins)
    shares = [set(pins.held.places) for pins in every]
    assert shares[0] | shares[1] == set(maintenance.uids)
    assert loaders[0].state_dict() == loaders[1].state_dict()
    steps(START.sample // 2 - 2)
    end = held_end(loaders[0])
    with shut(cohort, "refusing"):
        steps((end - START.sample) // 2)
        assert sum(one.stats().used_up_s for one in loaders) == 0
        for loader in loaders:
            loader.close()
    for rank, loader in enumerate(loaders):
        got[rank] += [int(batch["sample"]) for batch in loader]
        loader.close()
    order = Turned(
        loaders[0].dataset.order(0),
        [(START.sample, [n for n in range(COUNT) if cohort.uids[n // 4] in maintenance.uids])],
    )
    expected = [order.sample(p) for p in range(COUNT)]
    assert got == [expected[0::2], expected[1::2]]


@pytest.mark.parametrize("begun", [0, 1])
def test_a_rank_holds_what_its_own_samples_need_and_no_more(cohort: Cohort, begun: int) -> None:
    maintenance = Maintenance(0, 2, tuple(cohort.uids[:5]))
    for rank in range(2):
        dataset = SeriesDataset(cohort.path, seed=3)
        with SeriesLoader(dataset, rank=rank, world=2) as loader:
            # An odd number is done: another number of ranks, or an epoch's end, makes that.
            loader.load_state_dict(loader.state_dict() | {"done": begun})
            pins = pin(loader, maintenance, limit_bytes=BIG)
            pins.wait()
            loader.announce(maintenance, pins)
            order = loader.order(0)
            (held,) = order.held
            mine = [p for p in range(begun + rank, len(dataset), 2) if p in held]
            assert list(pins.held.places) == [dataset.uids[order.sample(p)] for p in mine]
            assert len(mine) in (1, 2)
            seen = [batch["uid"][0] for batch in loader]
            assert [one for one in seen if one in pins.held.places] == list(pins.held.places)


def test_what_was_closed_is_begun_anew_while_the_store_is_shut(cohort: Cohort) -> None:
    loader = made(cohort)
    pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
    pins.wait()
    loader.announce(ANNOUNCED, pins)
    training = Training(loader)
    training.run(START)
    loader.close()
    with shut(cohort, "refusing"):
        training.run(Position(0, held_end(loader)))
        assert loader.stats().used_up_s == 0
        loader.close()


def test_several_in_one_epoch(cohort: Cohort) -> None:
    second = Maintenance(0, 12, (uid(1), uid(4)))
    with made(cohort) as loader:
        loader.announce(ANNOUNCED)
        training = Training(loader)
        training.run(Position(0, 8))
        pins = pin(loader, second, limit_bytes=BIG)
        pins.wait()
        loader.announce(second, pins)
        assert [*loader.announced] == [ANNOUNCED, second]
        training.run(Position(0, 12))
        end = held_end(loader)
        assert end >= 16
        with shut(cohort, "refusing"):
            training.run(Position(0, end))
            assert loader.stats().used_up_s == 0
        training.run(Position(1, 0))
        assert sorted(n for batch in training.seen for n in batch) == list(range(COUNT))
        assert not loader.announced


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
def test_a_resume_in_the_middle_goes_on_in_the_turned_order(
    cohort: Cohort, undisturbed: tuple[list[list[int]], list[str]], again: bool
) -> None:
    middle = Position(0, 10)
    with made(cohort) as loader:
        first = Training(loader)
        loader.announce(ANNOUNCED)
        first.run(middle)
        state = json.loads(json.dumps(loader.state_dict()))
    with made(cohort, num_workers=1) as loader:
        loader.load_state_dict(state)
        assert loader.position == middle
        assert loader.announced == (ANNOUNCED,)
        first.loader = loader
        if not again:
            first.run(END)
        else:
            (maintenance,) = loader.announced
            pins = pin(loader, maintenance, limit_bytes=BIG)
            pins.wait()
            loader.announce(maintenance, pins)
            assert loader.announced == (ANNOUNCED,)
            with shut(cohort, "refusing"):
                first.run(Position(0, held_end(loader)))
                assert loader.stats().used_up_s == 0
            first.run(END)
    assert first.result == undisturbed


def test_more_ranks_may_go_on_and_hold_only_what_is_left(cohort: Cohort) -> None:
    with made(cohort) as loader:
        loader.announce(ANNOUNCED)
        Training(loader).run(Position(0, 10))
        state = loader.state_dict()
        end, order = held_end(loader), loader.order(0)
    left = [order.sample(p) // PER_SERIES for p in range(10, end)]
    for rank in range(2):
        with made(cohort, rank=rank, world=2) as loader:
            loader.load_state_dict(state)
            pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
            assert set(pins.held.places) == {uid(n) for n in left[rank::2]}
            pins.wait()
            loader.announce(ANNOUNCED, pins)
            with shut(cohort, "refusing"):
                Training(loader).run(Position(0, min(end, 10 + (end - 10) // 4 * 4)))
                assert loader.stats().used_up_s == 0


# --- letting go --------------------------------------------------------------------------------


def in_workers(pins: Pins) -> list[int]:
    """Return, for each worker that has the pinned memory, how much of it there is."""
    inode = os.fstat(pins.held._fd).st_ino
    found = []
    for child in multiprocessing.active_children():
        for entry in Path(f"/proc/{child.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "kakehashi-pinned" in str(entry.readlink()) and entry.stat().st_ino == inode:
                    found.append(entry.stat().st_blocks * 512)
    return found


def go(cohort: Cohort, name: str) -> None:
    cohort.path.with_name(name).unlink()


LOSSES: dict[str, Callable[[Cohort, Pins], None]] = {
    "unpinned": lambda _, pins: pins.unpin(),
    "ending": lambda cohort, _: lease(cohort, state="ending", message="over"),
    "over": lambda cohort, _: lease(cohort, ends_at="2020-01-01T00:00:00Z"),
    "no lease": lambda cohort, _: go(cohort, "lease.json"),
    "no session": lambda cohort, _: go(cohort, "session.json"),
}


@pytest.mark.parametrize(
    ("loss", "method"),
    [*((loss, "fork") for loss in LOSSES), ("unpinned", "spawn"), ("ending", "spawn")],
)
def test_what_is_dropped_is_freed_in_every_process_and_read_from_the_store_again(
    cohort: Cohort, undisturbed: tuple[list[list[int]], list[str]], loss: str, method: str
) -> None:
    with made(cohort, num_workers=2, start_method=method) as loader:
        training = Training(loader)
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
        pins.wait()
        total = sum(len(cohort.folder.contents[f"series/{one}.ozx"]) for one in PINNED)
        assert pins.progress().bytes == total
        assert total <= pins.held.bytes_in_memory() < total + 8192
        loader.announce(ANNOUNCED, pins)
        training.run(Position(0, 8))
        assert in_workers(pins) == [pins.held.bytes_in_memory()] * 2
        LOSSES[loss](cohort, pins)
        wait_for("the memory to be freed", lambda: pins.held.bytes_in_memory() == 0)
        assert in_workers(pins) == [0, 0]
        wait_for("its state", lambda: pins.progress().state == "dropped")
        assert pins.progress().bytes == 0
        with pytest.raises(LinkClosedError, match="pin it anew"):
            pins.wait()
        with pytest.raises(LinkClosedError):
            loader.announce(ANNOUNCED, pins)
        training.run(END)
    assert training.result == undisturbed


def test_a_session_that_is_only_offline_keeps_what_is_pinned(cohort: Cohort) -> None:
    with made(cohort) as loader:
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
        pins.wait()
        session = loader.dataset._stores.session
        lease(cohort, state="offline", expires_at="2020-01-01T00:00:00Z", message="no answer")
        assert session.lease().state == "offline"
        with pytest.raises(LabError, match="the memory to be freed"):
            wait_for("the memory to be freed", lambda: pins.held.bytes_in_memory() == 0, 0.3)
        assert pins.wait(0)
        lease(cohort, state="ending")
        wait_for("the memory to be freed", lambda: pins.held.bytes_in_memory() == 0)


def test_memory_that_a_loader_reads_is_freed_also_when_the_pins_themselves_are_forgotten(
    cohort: Cohort,
) -> None:
    with made(cohort) as loader:
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
        pins.wait()
        loader.announce(ANNOUNCED, pins)
        held = pins.held
        del pins
        gc.collect()
        assert held.bytes_in_memory() > 0
        lease(cohort, state="ending")
        wait_for("the memory to be freed", lambda: held.bytes_in_memory() == 0)


def test_nothing_of_it_outlives_its_last_user(cohort: Cohort) -> None:
    def memories() -> set[int]:
        gc.collect()
        found = set()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if "kakehashi-pinned" in str(entry.readlink()):
                    found.add(entry.stat().st_ino)
        return found

    def use() -> int:
        with made(cohort) as loader:
            pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
            pins.wait()
            loader.announce(ANNOUNCED, pins)
            Training(loader).run(Position(0, 8))
            inode = os.fstat(pins.held._fd).st_ino
            assert inode in memories()
            return inode

    inode = use()
    wait_for("the memory to be gone", lambda: inode not in memories())


class Silent:
    """A portal that does not answer."""

    def renew(self, key: SigningKey, counter: int) -> Grant:
        raise SessionError("the portal does not answer")


class Wrapper(Keeper):
    """The wrapper, as far as it keeps and tells the lease."""

    def __init__(self, folder: int, grant: Grant, offline_max_s: float) -> None:
        self._files = {"run": folder}
        self._grant = grant
        self._state = ("live", "")
        self._ending = None
        self.news: queue.SimpleQueue[watch.News] = queue.SimpleQueue()
        self._renewer = watch.Renewer(
            cast("HubClient", Silent()),
            cast("SigningKey", None),
            grant,
            offline_max_s,
            self.news.put,
        )
        self._write_lease()

    def listen(self) -> watch.News:
        news = self.news.get(timeout=20)
        self._hear(news)
        return news


def test_offline_max_drops_it_and_being_offline_does_not(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease's file is written by the wrapper itself."""
    monkeypatch.setattr(watch, "FIRST_RETRY_S", 0.2)
    now = dt.datetime.now(dt.UTC)
    times = {
        "issued_at": now,
        # Long over when the session ends for being offline.
        "expires_at": now + dt.timedelta(seconds=0.3),
        "ends_at": now + dt.timedelta(hours=8),
    }
    grant = object.__new__(Grant)
    grant.__dict__.update(times, heard=time.monotonic(), catalogue=None)
    folder = os.open(cohort.path.parent, os.O_RDONLY | os.O_DIRECTORY)
    wrapper = Wrapper(folder, grant, 2.0)
    with made(cohort) as loader:
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
        pins.wait()
        wrapper._renewer.start()
        said = [wrapper.listen().kind]
        session = loader.dataset._stores.session
        assert session.lease().state == "offline"
        while said[-1] == "offline":
            assert pins.wait(0), "offline is not over"
            said.append(wrapper.listen().kind)
        assert said[-1] == "lost"
        assert session.lease().expires_at < dt.datetime.now(dt.UTC)
        assert session.lease().state == "ending"
        assert "has not answered for 2 s" in session.lease().message
        wait_for("the memory to be freed", lambda: pins.held.bytes_in_memory() == 0)
    os.close(folder)


def test_a_session_without_a_lease_pins_nothing(cohort: Cohort) -> None:
    go(cohort, "lease.json")
    with made(cohort) as loader, pytest.raises(SessionError, match=r"lease\.json"):
        pin(loader, ANNOUNCED, limit_bytes=BIG)


def test_what_is_held_can_be_dropped_but_not_changed(cohort: Cohort) -> None:
    with made(cohort) as loader:
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
        pins.wait()
        fd = pins.held._fd
        path = f"series/{PINNED[0]}.ozx"
        content = cohort.folder.contents[path]
        assert pins.held.read(PINNED[0], 5, 1000) == content[5:1005]
        assert pins.held.read(PINNED[0], len(content) - 3, 100) == content[-3:]
        assert pins.held.read(PINNED[0], len(content), 5) == b""
        assert pins.held.read(uid(1), 0, 5) is None
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1 << 30)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        pins.unpin()
        assert pins.held.read(PINNED[0], 5, 1000) is None
        pins.unpin()


# --- pinning -----------------------------------------------------------------------------------


def test_more_than_the_bound_is_refused_with_the_numbers(cohort: Cohort) -> None:
    total = sum(len(cohort.folder.contents[f"series/{one}.ozx"]) for one in PINNED)
    with made(cohort) as loader:
        before = loader.dataset._stores.get().stats().bytes
        with pytest.raises(ValueError, match=rf"share is {total} bytes .* bound is {total - 1} "):
            pin(loader, ANNOUNCED, limit_bytes=total - 1)
        assert loader.dataset._stores.get().stats().bytes == before
        assert pin(loader, ANNOUNCED, limit_bytes=total).wait(30)


@pytest.mark.parametrize("how", ["silent", "refusing"])
def test_a_cut_while_pinning_is_waited_for(
    cohort: Cohort, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "_AHEAD_BYTES", 1)
    cut = contextlib.ExitStack()

    def told(progress: Any) -> None:
        if progress.series == 1:
            cut.enter_context(shut(cohort, how))

    with made(cohort) as loader:
        pins = pin(loader, Maintenance(*START, tuple(cohort.uids)), limit_bytes=BIG, progress=told)
        assert not pins.wait(0.7)
        progress = pins.progress()
        assert progress.state == "pinning"
        assert 0 < progress.series < progress.all_series == 6
        assert str(progress).startswith(f"pinning: {progress.series} of 6 series, 0.00 of 0.00 GB")
        with pytest.raises(ValueError, match="not all is pinned yet"):
            loader.announce(ANNOUNCED, pins)
        cut.close()
        assert pins.wait(30)
        for path, content in cohort.folder.contents.items():
            one = path.removeprefix("series/").removesuffix(".ozx")
            assert pins.held.read(one, 0, len(content)) == content


def test_pinning_can_be_stopped_in_a_cut(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_AHEAD_BYTES", 1)
    first = threading.Event()
    with made(cohort) as loader:
        with shut(cohort):
            pins = pin(loader, ANNOUNCED, limit_bytes=BIG, progress=lambda _: first.set())
            assert not pins.wait(0.2)
            pins.unpin()
            with pytest.raises(LinkClosedError):
                pins.wait(10)
            assert not pins._thread.is_alive()
        assert pins.held.bytes_in_memory() == 0
        assert not first.is_set()
        assert repr(pins).startswith("<Pins, dropped: 0 of 3 series")


def test_a_lease_that_ends_stops_pinning(cohort: Cohort) -> None:
    with made(cohort) as loader, shut(cohort):
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
        lease(cohort, state="ending")
        with pytest.raises(LinkClosedError):
            pins.wait(20)


def test_a_wrong_block_is_named_and_nothing_is_held(cohort: Cohort) -> None:
    path = cohort.folder.root / f"series/{PINNED[1]}.ozx"
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    with made(cohort) as loader:
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG)
        with pytest.raises(BlockMismatchError, match=PINNED[1]):
            pins.wait(30)
        assert pins.progress().state == "failed"
        assert pins.held.bytes_in_memory() == 0
        with pytest.raises(LinkError, match=PINNED[1]):
            loader.announce(ANNOUNCED, pins)
        assert loader.announced == ()
        pins.unpin()
        with pytest.raises(BlockMismatchError):
            pins.wait()


@pytest.mark.parametrize("at", [1, 3])
def test_what_the_listener_raises_is_raised(cohort: Cohort, at: int) -> None:
    def told(progress: Any) -> None:
        if progress.series == at:
            raise RuntimeError("no such widget")

    with made(cohort) as loader:
        pins = pin(loader, ANNOUNCED, limit_bytes=BIG, progress=told)
        with pytest.raises(RuntimeError, match="no such widget"):
            pins.wait(30)
        assert pins.held.bytes_in_memory() == 0


def test_a_rank_with_nothing_to_hold_is_ready_at_once(cohort: Cohort) -> None:
    nothing = Maintenance(*START, ())
    with made(cohort) as loader:
        pins = pin(loader, nothing, limit_bytes=0)
        assert pins.wait(10)
        loader.announce(nothing, pins)
        assert sorted(n for b in loader for n in b["sample"].tolist()) == list(range(COUNT))


# --- figures -----------------------------------------------------------------------------------


def test_an_estimate_says_what_is_held_what_is_not_and_how_long_it_lasts(cohort: Cohort) -> None:
    sizes = {one: len(cohort.folder.contents[f"series/{one}.ozx"]) for one in cohort.uids}
    total = sum(sizes.values())
    with made(cohort) as loader:
        order = loader.dataset.order(0)
        coming = list(
            dict.fromkeys(
                cohort.uids[order.sample(p) // PER_SERIES] for p in range(START.sample, COUNT)
            )
        )
        limit = sizes[coming[0]] + sizes[coming[1]]
        estimate = plan(loader, START, limit_bytes=limit, rate=2.0, window_s=60)
        assert estimate.maintenance == Maintenance(*START, tuple(coming[:2]))
        samples = sum(
            cohort.uids[order.sample(p) // PER_SERIES] in coming[:2]
            for p in range(START.sample, COUNT)
        )
        assert estimate == Estimate(
            estimate.maintenance, limit, limit, 2, 6, limit, total, samples, 2.0, 60
        )
        assert estimate.lasts_s == samples / 2
        assert estimate.covers == samples / 2 / 60
        loader.announce(estimate.maintenance)
        assert loader.order(0).held == (range(START.sample, START.sample + samples),)
    text = str(estimate)
    for part in (
        "from epoch 0, sample 6 on:",
        f"2 of 6 series held: {limit / 1e6:.3f} MB",
        f"memory of this rank: {limit / 1e6:.3f} MB, bound {limit / 1e6:.3f} MB",
        f"{samples} samples at 2 a second last {samples / 2:.0f} seconds",
        f"that is {samples / 120:.0%} of the window of 60 seconds",
        "then the loop waits for the store, and goes on by itself",
        f"not held: 4 series, {(total - limit) / 1e6:.3f} MB",
    ):
        assert part in text.splitlines(), text


def test_if_all_fits_all_is_held_and_it_lasts_for_ever(cohort: Cohort) -> None:
    total = sum(map(len, cohort.folder.contents.values()))
    with made(cohort) as loader:
        estimate = plan(loader, START, limit_bytes=total, window_s=7200.0)
        assert (estimate.samples, estimate.lasts_s, estimate.covers) == (None, math.inf, 1)
        assert "for as long as the store is shut" in str(estimate)
        assert "not held" not in str(estimate)
        pins = pin(loader, estimate.maintenance, limit_bytes=total)
        pins.wait()
        loader.announce(estimate.maintenance, pins)
        order = [loader.order(0).sample(p) for p in range(COUNT)]
        assert order == [loader.dataset.order(0).sample(p) for p in range(COUNT)]
        with shut(cohort, "refusing"):
            training = Training(loader)
            training.run(Position(4, 0))
        assert loader.stats().used_up_s == 0
        assert len(training.seen) == 4 * COUNT / 2


def test_series_that_were_left_out_are_said_to_be_not_held(cohort: Cohort) -> None:
    with made(cohort) as loader:
        estimate = plan(loader, START, limit_bytes=BIG, uids=PINNED)
        assert set(estimate.maintenance.uids) == set(PINNED)
        assert "3 of 6 series held" in str(estimate)
        assert "not held: 3 series" in str(estimate)
        assert "how long they last is not known without a rate" in str(estimate)
        assert (estimate.lasts_s, estimate.covers) == (None, None)
        none = plan(loader, START, limit_bytes=0, rate=1.0, window_s=10)
        assert none.maintenance.uids == ()
        assert (none.samples, none.lasts_s, none.covers) == (0, 0, 0)


def test_where_the_loop_will_be(cohort: Cohort) -> None:
    with made(cohort, rank=0, world=2) as loader:

        def at(seconds: float, rate: float = 1.0, margin: float = 0) -> Position:
            when = NOW + dt.timedelta(seconds=seconds)
            return position_at(loader, when, rate=rate, now=NOW, margin_s=margin)

        assert at(0) == at(3.9) == (0, 0)
        assert at(4) == at(7.9) == (0, 4)
        assert at(10, rate=2) == (0, 20)
        assert at(23.9) == (0, 20)
        assert at(24) == (1, 0)
        assert at(24 + 24 + 9) == (2, 8)
        assert at(14, margin=10) == (0, 4)
        assert at(5, margin=10) == at(-100) == (0, 0)
        batches = iter(loader)
        next(batches)
        assert at(0) == (0, 4)
        assert at(19.9) == (0, 20)
        assert at(20) == (1, 0)
        with pytest.raises(ValueError, match="give rate="):
            position_at(loader, NOW, now=NOW)
        next(batches)
        rate = loader.stats().rate
        assert rate is not None
        assert rate > 0
        later = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        assert position_at(loader, later) > (5, 0)
        naive = NOW.replace(tzinfo=None)
        for when, now in ((naive, NOW), (NOW, naive)):
            with pytest.raises(ValueError, match="must have a zone"):
                position_at(loader, when, rate=1.0, now=now)


def test_what_cannot_be_announced_is_refused_with_what_can(cohort: Cohort) -> None:
    with made(cohort) as loader:
        Training(loader).run(Position(0, 4))

        def each(maintenance: Maintenance, match: str) -> None:
            with pytest.raises(ValueError, match=match):
                loader.announce(maintenance)
            with pytest.raises(ValueError, match=match):
                pin(loader, maintenance, limit_bytes=BIG)
            if maintenance.uids:
                with pytest.raises(ValueError, match=match):
                    plan(loader, maintenance.start, limit_bytes=BIG, uids=maintenance.uids)

        each(Maintenance(0, 3, PINNED), r"from \(0, 4\) on, at samples 0 to 23 .* got \(0, 3\)")
        each(Maintenance(0, 24, PINNED), r"at samples 0 to 23 .* got \(0, 24\)")
        each(Maintenance(1, -1, PINNED), r"got \(1, -1\)")
        each(Maintenance(0, 9, ("9.9",)), r"no series '9\.9'")
        loader.announce(ANNOUNCED)
        each(Maintenance(*START, (uid(1),)), r"from \(0, 7\) on")
        loader.announce(Maintenance(0, 23, PINNED))
        each(Maintenance(0, 23, (uid(1),)), r"from \(1, 0\) on")
