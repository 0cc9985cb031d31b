"""Traffic of a session: the right bytes in the right second, from all of its processes."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import multiprocessing.pool
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from kakehashi.link import SeriesDataset, SeriesLoader, Store, recorder, tally
from kakehashi.link.moments import together
from kakehashi.link.recorder import step
from kakehashi.link.tally import MINUTE, SECOND, Moment, Tally
from kakehashi.link.traffic import Outage, Summary, TrafficLog, outages, site_table
from tests.lab.hosts import wait_for
from tests.link.mounted import MountedView
from tests.link.stores import BLOCK
from tests.link.volumes import Cohort, uid

# Each of several blocks, so that its directory alone is not all of it.
SHAPES = [(24, 128, 128), (28, 128, 120), (24, 120, 128), (26, 128, 128)]


@pytest.fixture
def cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cohort]:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    cohort = Cohort(tmp_path / "cohort", SHAPES)
    cohort.write(session=secrets.token_hex(16))
    yield cohort
    cohort.close()


def read_all(path: Path) -> int:
    """Read the whole cohort; returns the bytes that the store's reader counted."""
    with Store(path) as store:
        for series in store.cohort:
            _ = series.read_packed()
        return store.stats().bytes


def total(log: TrafficLog) -> int:
    return sum(one.bytes for one in log.seconds())


# --- what is counted -------------------------------------------------------------------------


def test_every_byte_is_counted_in_its_second(cohort: Cohort) -> None:
    log = TrafficLog(cohort.path)
    assert log.seconds() == []
    before = int(time.time())
    read = read_all(cohort.path)
    assert read >= sum(len(data) for data in cohort.folder.contents.values())
    assert total(log) == read
    assert {one.at for one in log.seconds()} <= set(range(before, int(time.time()) + 1))
    assert sum(one.bytes for one in log.minutes()) == read
    found = log.summary()
    assert (found.bytes, found.site, found.outages) == (read, "slurm", 0)
    # Closing a reader loses no channel.
    assert found.reconnects == 0
    assert found.rtt_s is not None
    assert 0 < found.rtt_s < 1


def elsewhere(code: str, cohort: Cohort) -> str:
    """Run code in another process; returns what it printed."""
    argv = [sys.executable, "-c", code, str(cohort.path)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120).stdout


def test_two_readers_and_another_process_are_one_sum(cohort: Cohort) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.link.test_traffic import read_all; "
        "print(read_all(Path(sys.argv[1])))"
    )
    away = elsewhere(code, cohort)
    here = [read_all(cohort.path), read_all(cohort.path)]
    assert total(TrafficLog(cohort.path)) == sum(here) + int(away)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting FUSE by mount(2) needs root")
def test_what_programs_read_below_the_mount_is_in_it(cohort: Cohort, tmp_path: Path) -> None:
    def connect() -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.connect(str(cohort.broker.path))
        return channel

    (tmp_path / "mnt").mkdir()
    store = cohort.folder
    view = MountedView(tmp_path / "mnt", connect, store.manifest_path, store.sha256, ())
    with contextlib.closing(view):
        view.ready()
        cohort.write(session=secrets.token_hex(16), traffic=[str(view.root / tally.VIEW_NAME)])
        log = TrafficLog(cohort.path)
        assert total(log) == 0
        # The series, and their lists of hashes.
        below = sum(len(data) - 32 * (-len(data) // BLOCK) for data in store.contents.values())
        for path, data in store.contents.items():
            assert (view.root / path).read_bytes() == data
        assert total(log) == below
        assert log.summary().channels > 0
        read = read_all(cohort.path)
        assert total(log) == below + read
        # A view that has its hands full with reads that wait does not hold up who asks.
        os.kill(view.process.pid, signal.SIGSTOP)
        try:
            assert total(log) == below + read
            begun = time.monotonic()
            assert {total(log) for _ in range(20)} == {below + read}
            assert time.monotonic() - begun < 5, "it waits but once"
        finally:
            os.kill(view.process.pid, signal.SIGCONT)
        wait_for("the view to tell again", lambda: not asking())
        (view.root / "manifest.json").read_bytes()
        assert total(log) == below + read
    assert total(log) == below + read


def asking() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "kakehashi-traffic-view"]


def test_another_session_is_not_in_it(cohort: Cohort) -> None:
    read = read_all(cohort.path)
    other = TrafficLog(cohort.path)
    cohort.write(session=secrets.token_hex(16))
    assert TrafficLog(cohort.path).seconds() == []
    assert total(other) == read


def test_workers_of_a_loader_are_counted_also_after_they_have_ended(cohort: Cohort) -> None:
    log = TrafficLog(cohort.path)
    with SeriesLoader(SeriesDataset(cohort.path), num_workers=2, start_method="fork") as loader:
        for _ in loader:
            pass
        expected = sum(len(cohort.folder.contents[f"series/{one}.ozx"]) for one in cohort.uids)
        wait_for("the workers' bytes", lambda: total(log) >= expected, seconds=30)
    folder = tally.shared_folder(log.session.session)
    assert folder is not None
    assert len(list(folder.glob("*.live"))) == 3
    after = total(log)
    # The next process folds those that have ended into one file, and nothing is lost.
    recorder._recorders.clear()
    recorder.of(log.session)
    assert len(list(folder.glob("*.live"))) <= 2
    assert total(log) == after
    assert log.summary().steps == len(SHAPES)


def test_what_a_killed_process_had_counted_stays(cohort: Cohort) -> None:
    log = TrafficLog(cohort.path)
    code = (
        "import sys, signal; from pathlib import Path;"
        "from tests.link.test_traffic import read_all, TrafficLog;"
        "print(read_all(Path(sys.argv[1])));"
        "TrafficLog(sys.argv[1]).seconds(); print('counted', flush=True); signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(cohort.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        read = int(process.stdout.readline())
        assert process.stdout.readline() == "counted\n"
        process.kill()
    assert total(log) == read
    recorder.of(log.session)
    assert total(log) == read


def test_without_a_runtime_folder_a_process_has_its_own(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    read = read_all(cohort.path)
    assert total(TrafficLog(cohort.path)) == read


def test_room_is_taken_at_once_and_a_full_folder_costs_no_read(cohort: Cohort) -> None:
    folder = tally.shared_folder(TrafficLog(cohort.path).session.session)
    assert folder is not None
    tally.begin(folder).close()
    (file,) = folder.glob("*.live")
    assert file.stat().st_blocks * 512 >= file.stat().st_size > 0
    # In a process that can make no file of that size.
    code = (
        "import resource, sys; from pathlib import Path;"
        "from tests.link.test_traffic import TrafficLog, read_all, total;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536));"
        "read = read_all(Path(sys.argv[1])); print(read, total(TrafficLog(sys.argv[1])))"
    )
    read, seen = map(int, elsewhere(code, cohort).split())
    assert seen == read > 0
    # The others do not see it.
    assert total(TrafficLog(cohort.path)) == 0


def test_a_forked_process_does_not_write_into_its_parents(cohort: Cohort) -> None:
    read = read_all(cohort.path)
    child = multiprocessing.get_context("fork").Process(target=read_all, args=(cohort.path,))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    log = TrafficLog(cohort.path)
    own = recorder.of(log.session)
    own.note()
    assert sum(one.bytes for one in own.tally.read(SECOND)) == read
    assert total(log) == 2 * read


# --- cuts and steps --------------------------------------------------------------------------


def test_a_cut_shows_as_an_outage_and_the_loop_as_waiting(cohort: Cohort) -> None:
    log = TrafficLog(cohort.path)
    with SeriesLoader(SeriesDataset(cohort.path), ring_bytes=1) as loader:
        batches = iter(loader)
        next(batches)
        assert log.outages() == ()
        cohort.broker.send(signal.SIGSTOP)
        loop = multiprocessing.pool.ThreadPool(1)
        rest = loop.apply_async(lambda: list(batches))
        wait_for("an outage", lambda: sum(one.seconds for one in log.outages()) >= 3, seconds=30)
        live = log.seconds()
        # It is seen while it lasts, and so is the wait.
        assert sum(one.waited_s for one in live) > 2
        assert sum(one.steps for one in live) == 1
        cohort.broker.send(signal.SIGCONT)
        assert len(rest.get(timeout=60)) == len(SHAPES) - 1
        loop.terminate()
    (cut,) = log.outages()
    assert 3 <= cut.seconds <= 20
    inside = [one for one in log.seconds() if cut.begin <= one.at < cut.end]
    assert sum(one.bytes for one in inside) == 0
    # From somewhere in the first second on: which one that is, is the machine's business.
    assert cut.seconds - 1 <= sum(one.waited_s for one in inside) <= cut.seconds + 0.01
    found = log.summary()
    assert (found.steps, found.outages, found.outage_s) == (len(SHAPES), 1, cut.seconds)


def test_a_killed_channel_is_a_reconnect_and_no_outage(cohort: Cohort) -> None:
    log = TrafficLog(cohort.path)
    with Store(cohort.path) as store:
        _ = store.series(uid(0)).read_packed()
        cohort.broker.send(signal.SIGKILL)
        _ = store.series(uid(1)).read_packed()
        assert log.summary().reconnects == store.stats().reconnects > 0
    assert log.outages() == ()


def test_what_is_older_than_a_ring_goes_back_is_not_in_it(cohort: Cohort) -> None:
    log = TrafficLog(cohort.path)
    with contextlib.closing(tally.begin(tally.shared_folder(log.session.session))) as made:
        made.add(Moment(int(time.time()) - 8 * 24 * 3600, bytes=5))
        made.add(Moment(int(time.time()) - 60, bytes=7))
        assert sum(one.bytes for one in log.minutes()) == 7
        assert log.summary().bytes == 7


def test_a_store_that_is_dropped_is_freed(cohort: Cohort) -> None:
    store = Store(cohort.path)
    _ = next(iter(store.cohort)).read_packed()
    gone = weakref.ref(store.reader)
    del store
    gc.collect()
    assert gone() is None


def test_an_idle_reader_is_no_traffic(cohort: Cohort) -> None:
    log = TrafficLog(cohort.path)
    with Store(cohort.path) as store:
        _ = next(iter(store.cohort)).read_packed()
        first = log.seconds()
        assert any(one.rtt_s for one in first)
        until = int(time.time()) + 3
        wait_for("some seconds", lambda: time.time() > until)
        assert log.seconds()[-1].at <= first[-1].at + 1


def test_idleness_is_no_outage(cohort: Cohort) -> None:
    log = TrafficLog(cohort.path)
    with Store(cohort.path) as store:
        _ = store.series(uid(0)).read_packed()

        threading.Event().wait(4.5)
        assert log.outages() == ()
        assert sum(one.asked_s for one in log.seconds()) <= 2


def test_a_loop_of_ones_own_marks_its_steps(cohort: Cohort) -> None:
    log = TrafficLog(cohort.path)
    for waits_s in (1.2, 0.3):
        with step(cohort.path):
            threading.Event().wait(waits_s)
    with pytest.raises(StopIteration), step(cohort.path):
        next(iter(()))
    found = log.summary()
    assert found.steps == 2
    assert found.waited_s == pytest.approx(1.5, abs=0.3)
    assert all(one.waited_s <= 1.01 for one in log.seconds())


def test_the_thread_ends_with_the_last_reader(cohort: Cohort) -> None:
    with Store(cohort.path) as store:
        running = recorder.of(store.session)
        assert running._thread is not None
    wait_for("the thread to end", lambda: running._thread is None, seconds=10)
    with Store(cohort.path):
        assert running._thread is not None


# --- the tally -------------------------------------------------------------------------------


def test_memory_is_bounded_and_what_is_old_leaves() -> None:
    own = Tally()
    size = len(own._memory)
    start = 1_800_000_000
    for at in range(start, start + 3 * 3600):
        own.add(Moment(at, bytes=1))
    assert len(own._memory) == size < 1 << 20
    assert sorted(one.at for one in own.read(SECOND)) == list(
        range(start + 2 * 3600, start + 3 * 3600)
    )
    assert sum(one.bytes for one in own.read(MINUTE)) == 3 * 3600
    # What comes late for a second that has left is not put into another one.
    own.add(Moment(start, bytes=5))
    assert sum(one.bytes for one in own.read(SECOND)) == 3600


moments = st.builds(
    lambda asked, **rest: Moment(asked_s=asked[0], stalled_s=asked[1], **rest),
    # Only where something was asked for can nothing have come.
    asked=st.sampled_from([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]),
    at=st.integers(1_800_000_000, 1_800_000_200),
    bytes=st.integers(0, 1 << 40),
    steps=st.integers(0, 50),
    channels=st.integers(0, 16),
    rtt_s=st.sampled_from([0.0, 0.25, 0.5]),
)


@given(st.lists(st.tuples(st.integers(0, 3), moments), max_size=60))
def test_folding_in_any_order_gives_the_same(done: list[tuple[int, Moment]]) -> None:
    four = [Tally() for _ in range(4)]
    for number, moment in done:
        four[number].add(moment)
    apart = together(four, SECOND)
    folded = Tally()
    for number in (2, 0, 3):
        folded.fold(four[number])
    assert together([four[1], folded], SECOND) == apart
    assert sum(one.bytes for one in apart) == sum(moment.bytes for _, moment in done)
    # What is folded one by one is what is summed at once.
    singly = Tally()
    for one in four:
        singly.fold(one)
    assert sorted(singly.read(SECOND), key=lambda one: one.at) == apart


def test_a_byte_for_one_process_ends_the_outage_of_all() -> None:
    stalled = Moment(7, asked_s=1, stalled_s=1)
    assert stalled.beside(stalled).stalled_s == 1
    assert stalled.beside(Moment(7)).stalled_s == 1
    assert stalled.beside(Moment(7, bytes=1, asked_s=1)).stalled_s == 0


def test_outages_are_runs_of_whole_seconds() -> None:
    dead = [Moment(at, asked_s=1, stalled_s=1) for at in (3, 10, 11, 12, 20, 21)]
    fine = [Moment(13, bytes=1, asked_s=1), Moment(22, bytes=1, asked_s=1)]
    assert outages(sorted([*dead, *fine], key=lambda one: one.at)) == (
        Outage(10, 13),
        Outage(20, 22),
    )
    assert outages(fine) == ()


# --- table and picture -----------------------------------------------------------------------


class Made(TrafficLog):
    """A log of made-up seconds."""

    def __init__(self, path: Path, own: Tally) -> None:
        super().__init__(path)
        self.own = own

    def _read(self, step: int, since: int) -> list[Moment]:
        return together([self.own], step, since)


@pytest.fixture
def made(cohort: Cohort) -> Made:
    """Two minutes: 80 MB/s, a cut from second 40 to 60, then 40 MB/s."""
    own, start = Tally(), int(time.time()) - 120
    for number in range(120):
        cut = 40 <= number < 60
        rate = 0 if cut else 80_000_000 if number < 40 else 40_000_000
        own.add(
            Moment(
                start + number,
                bytes=rate,
                steps=0 if cut else 4,
                channels=6,
                asked_s=1,
                stalled_s=float(cut),
                waited_s=1.0 if cut else 0.1,
                reconnects=6 if number == 60 else 0,
                rtt_s=0.0102 if number < 60 else 0.0201,
            )
        )
    return Made(cohort.path, own)


def test_the_summary_says_what_was(made: Made) -> None:
    found = made.summary()
    assert found.bytes == 40 * 80_000_000 + 60 * 40_000_000
    assert found.mean_rate == pytest.approx(found.bytes / 120)
    assert found.best_rate == 80_000_000
    assert (found.steps, found.outages, found.outage_s, found.reconnects) == (400, 1, 20, 6)
    assert found.waited_s == pytest.approx(30, abs=0.01)
    assert found.rtt_s == pytest.approx(0.0102, rel=1e-5)


def test_the_picture_shows_the_values(made: Made, tmp_path: Path) -> None:
    figure = made.figure()
    top, middle, bottom = figure.axes[:3]
    (_, line) = top.patches[:2]
    values = line.get_data()  # type: ignore[attr-defined]
    assert list(values.values) == [80.0] * 40 + [0.0] * 20 + [40.0] * 60
    assert list(values.edges) == list(range(121))
    spans = [patch for patch in top.patches if "nothing came" in str(patch.get_label())]
    assert [(one.get_x(), one.get_width()) for one in spans] == [(40, 20)]  # type: ignore[attr-defined]
    assert top.get_ylabel() == "MB/s"
    assert bottom.get_ylabel() == "ms"
    assert middle.get_ylabel() == "batches/s"
    words = " ".join(text.get_text() for text in figure.texts)
    for word in ("slurm", "5.60 GB", "46.7 MB/s", "80.0 MB/s", "outages: 1 (20 s)", "view"):
        assert word in words + figure.get_suptitle() + figure.get_supxlabel()


def test_the_pixels_are_where_the_values_are(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "traffic.png"
    made.save_png(path, dpi=100)
    image = np.asarray(imread(path))[..., :3]
    figure = made.figure()
    figure.dpi = 100
    figure.canvas.draw()
    top = figure.axes[0]

    def colour(second: float, rate: float) -> tuple[int, ...]:
        x, y = top.transData.transform((second, rate))
        return tuple(round(255 * part) for part in image[len(image) - 1 - int(y), int(x)])

    white = (255, 255, 255)
    filled = colour(20, 70)
    assert filled[2] > filled[0] + 50, "blue below the line"
    assert colour(20, 84) == white
    assert colour(100, 30) == filled
    assert colour(100, 50) == white
    cut = colour(50, 30)
    assert cut[0] > cut[2] + 30, "the outage is shaded"


def test_a_table_of_several_sites(made: Made, tmp_path: Path) -> None:
    one = made.summary()
    one.save(tmp_path / "one.json")
    assert Summary.load(tmp_path / "one.json") == one
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"Summary\.save"):
        Summary.load(tmp_path / "other.json")
    text = site_table([one, one, Summary(**{**one.__dict__, "site": "<far>", "rtt_s": 0.05})])
    assert "<far>" not in text
    assert "<td>&lt;far&gt;</td><td>1</td><td>50.0 ms</td>" in text
    assert "<td>slurm</td><td>2</td><td>10.2 ms</td>" in text
    assert "<td>46.7 MB/s</td><td>80.0 MB/s</td><td>11.20 GB</td>" in text


def test_an_empty_log_can_be_drawn(cohort: Cohort, tmp_path: Path) -> None:
    log = TrafficLog(cohort.path)
    log.save_png(tmp_path / "empty.png")
    assert "unknown" in log._repr_html_()
    assert (tmp_path / "empty.png").stat().st_size > 1000
