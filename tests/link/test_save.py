"""Checkpoints through a real SFTP server: cut, killed, full, slow, and never torn."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakehashi.errors import SessionError
from kakehashi.link import DamagedError, Saver, load, save, upload
from kakehashi.link.sftpwrite import WritingSftp
from kakehashi.link.upload import HELD, RANGE, TornError
from kakehashi.link.work import (
    WorkError,
    WorkFullError,
    WorkLostError,
    WorkNotFoundError,
    part_name,
)
from kakehashi.link.workchannel import ChannelFolder
from tests.lab.hosts import heeding_ctrl_c, wait_for
from tests.link.stores import SFTP_SERVER, Broker, Server, parts, random_bytes
from tests.link.test_sshd import Sshd
from tests.link.test_work import Cutter, StepCutter, cut_point

PATIENCE_S = 20.0
REPOSITORY = Path(__file__).resolve().parents[2]
SERVER_WRITES = True
OLD, NEW = b"old " * 1000, random_bytes(700_000)
BIG = random_bytes(13 * RANGE + 17)


@pytest.fixture
def work(root: Path, server: Server) -> Iterator[ChannelFolder]:
    with ChannelFolder(server, root=str(root), patience_s=PATIENCE_S) as folder:
        yield folder


# What is saved.


@pytest.mark.parametrize("data", [b"", b"x", NEW, BIG], ids=["none", "one", "some", "much"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_come_back(
    work: ChannelFolder, root: Path, data: bytes, kind: Callable[[bytes], object]
) -> None:
    saved = save("a.bin", kind(data), work=work)
    assert (saved.name, saved.size, saved.superseded) == ("a.bin", len(data), False)
    assert (root / "a.bin").read_bytes() == data
    assert load("a.bin", work=work) == data
    assert not parts(root)


def test_a_function_writes_into_a_file(work: ChannelFolder, root: Path) -> None:
    def into(file: BinaryIO) -> None:
        for number in range(100_000):
            assert file.write(b"%d\n" % number) > 1

    save("numbers.txt", into, work=work)
    assert (root / "numbers.txt").read_text().split() == [str(n) for n in range(100_000)]


def test_a_state_dict_comes_back(work: ChannelFolder, root: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {"weight": torch.arange(3_000_000).reshape(3, -1), "step": 7}
    save("model.pt", state, work=work)
    for found in (load("model.pt", torch.load, work=work), torch.load(root / "model.pt")):
        assert torch.equal(found["weight"], state["weight"])
        assert found["step"] == 7
    module = torch.nn.Linear(2, 3)
    save("whole.pt", module, work=work)
    again = load("whole.pt", lambda file: torch.load(file, weights_only=False), work=work)
    assert torch.equal(again.weight, module.weight)


def test_the_sums_are_those_that_sha256sum_knows(work: ChannelFolder, root: Path) -> None:
    save("a.bin", NEW, work=work)
    subprocess.run(["sha256sum", "--check", ".a.bin.sha256"], cwd=root, check=True)


@pytest.mark.parametrize("name", ["", "folder/", "/a", "../a", "a.~3~"])
def test_a_name_that_cannot_be_is_refused(work: ChannelFolder, root: Path, name: str) -> None:
    (root / "folder").mkdir()
    with pytest.raises(WorkError):
        save(name, b"x", work=work)
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_a_folder_that_is_not_there_is_said(work: ChannelFolder) -> None:
    with pytest.raises(WorkNotFoundError):
        save("none/a", b"x", work=work)


def test_outside_of_a_session_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAKEHASHI_SESSION", str(tmp_path / "none.json"))
    for call in (lambda: save("a", b"x"), lambda: load("a"), Saver):
        with pytest.raises(SessionError, match="only available inside"):
            call()


# What is loaded.


def test_a_changed_file_is_not_given_out(work: ChannelFolder, root: Path) -> None:
    save("a.bin", NEW, work=work)
    for changed in (NEW[:-1], NEW + b"x", b"?" + NEW[1:], b""):
        (root / "a.bin").write_bytes(changed)
        with pytest.raises(DamagedError, match="not what was saved"):
            load("a.bin", work=work)
    (root / "a.bin").write_bytes(NEW)
    assert load("a.bin", work=work) == NEW


def test_what_was_not_saved_here_is_not_vouched_for(work: ChannelFolder, root: Path) -> None:
    (root / "a.bin").write_bytes(NEW)
    with pytest.raises(WorkNotFoundError, match="was not saved by"):
        load("a.bin", work=work)
    with pytest.raises(WorkNotFoundError):
        load("b.bin", work=work)


# Kept versions.


def versions(root: Path, name: str = "a") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.glob(f"{name}*")}


def test_the_last_ones_are_kept(work: ChannelFolder, root: Path) -> None:
    for number in range(5):
        save("a", b"%d" % number, keep=3, work=work)
        assert load("a", work=work) == b"%d" % number
    assert versions(root) == {"a": b"4", "a.~3~": b"2", "a.~4~": b"3", "a.~5~": b"4"}
    assert load("a.~4~", work=work) == b"3"
    save("a", b"5", keep=2, work=work)
    assert versions(root) == {"a": b"5", "a.~5~": b"4", "a.~6~": b"5"}


def test_rotation_is_whole_whatever_packet_is_lost(tmp_path: Path) -> None:
    def run(after: int | None, towards_store: bool, comes_back: bool) -> int:
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        with contextlib.closing(Server(writes=True)) as calm:
            folder = ChannelFolder(calm, root=str(root), patience_s=PATIENCE_S)
            for number in range(2):
                save("a", b"%d" % number, keep=2, work=folder)
            folder.close()
        cutter = StepCutter(towards_store, after, comes_back=comes_back)
        with contextlib.closing(cutter):
            folder = ChannelFolder(cutter, root=str(root), patience_s=PATIENCE_S * comes_back)
            acknowledged = False
            with contextlib.suppress(WorkLostError):
                save("a", b"2", keep=2, work=folder)
                acknowledged = True
            cutter.gone, cutter.after = False, None
            newest = load("a", work=folder)
            assert newest == b"2" or (newest == b"1" and not acknowledged)
            assert acknowledged or not comes_back
            kept = {load(name, work=folder) for name in versions(root) if name != "a"}
            # The present one and the one before it, and maybe one more until the next save.
            assert {newest, b"%d" % (int(newest) - 1)} <= kept
            if comes_back:
                assert versions(root) == {"a": b"2", "a.~2~": b"1", "a.~3~": b"2"}
            save("a", b"3", keep=2, work=folder)
            assert load("a", work=folder) == b"3"
            assert len(versions(root)) == 3
            assert not parts(root)
            folder.close()
        return cutter.passed[towards_store]

    for towards_store in (True, False):
        packets = run(None, towards_store, comes_back=True)
        assert packets > 20
        # What comes before is a write as any other.
        for after in range(packets // 3, packets):
            run(after, towards_store, comes_back=True)
            run(after, towards_store, comes_back=False)


# Cuts.


@settings(max_examples=40)
@given(st.booleans(), st.floats(0, 1), st.booleans())
def test_a_cut_anywhere_leaves_the_old_or_the_new(
    towards_store: bool, place: float, comes_back: bool
) -> None:
    with tempfile.TemporaryDirectory() as base, contextlib.ExitStack() as stack:
        root = Path(base)
        calm = Server(writes=True)
        stack.callback(calm.close)
        folder = stack.enter_context(ChannelFolder(calm, root=str(root), patience_s=PATIENCE_S))
        save("a", OLD, work=folder)
        cutter = Cutter(towards_store, cut_point(place, len(BIG)), comes_back=comes_back)
        stack.callback(cutter.close)
        patience_s = PATIENCE_S if comes_back else 0.1
        cut = stack.enter_context(ChannelFolder(cutter, root=str(root), patience_s=patience_s))
        acknowledged = False
        with contextlib.suppress(WorkLostError):
            save("a", BIG, work=cut)
            acknowledged = True
        assert acknowledged or not comes_back
        found = load("a", work=folder)
        assert found == BIG or (found == OLD and not acknowledged)


def test_servers_that_are_killed_again_and_again(root: Path) -> None:
    """Each time when a few more ranges have passed, all channels at once."""

    class Killer(Cutter):
        def _pass_on(self, source: socket.socket, sink: socket.socket, number: int | None) -> None:
            super()._pass_on(source, sink, number)
            with self._count:
                if self.after is None and self.passed[True] < 3 * len(BIG):
                    self.after = self.passed[True] + 5 * RANGE

    killer = Killer(True, RANGE)
    with ChannelFolder(killer, root=str(root), patience_s=PATIENCE_S) as folder:
        save("a", BIG, work=folder)
        killer.after = None
        assert load("a", work=folder) == BIG
    killer.close()
    assert killer.opened > 8
    assert not parts(root)


def test_a_machine_that_starts_anew_before_the_flush_is_noticed(
    work: ChannelFolder, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read back was in its memory, and is gone; the flush afterwards finds nothing."""
    save("a", OLD, work=work)
    fsync, crashed = WritingSftp.fsync, threading.Event()

    def crash(sftp: WritingSftp, handle: bytes) -> None:
        names = parts(root)
        if not crashed.is_set() and names and (root / names[0]).stat().st_size == len(BIG):
            crashed.set()
            server.kill()
            with (root / names[0]).open("r+b") as file:
                file.truncate(2 * RANGE)
                file.truncate(len(BIG))
        fsync(sftp, handle)

    monkeypatch.setattr(WritingSftp, "fsync", crash)
    with pytest.raises(TornError):
        save("a", BIG, work=work)
    assert crashed.is_set()
    assert load("a", work=work) == OLD
    save("a", BIG, work=work)
    assert load("a", work=work) == BIG


# Channels.


class Scarce(Server):
    """Gives so many channels at once and refuses more, as a session's wrapper does."""

    def __init__(self, most: int) -> None:
        super().__init__(writes=True)
        self.most = most
        self.refused = 0

    def __call__(self) -> socket.socket:
        if sum(process.poll() is None for process in self._processes) < self.most:
            return super().__call__()
        self.refused += 1
        near, far = socket.socketpair()
        far.close()
        return near


@pytest.mark.parametrize("most", [1, 2, 16])
def test_a_refused_channel_is_no_error(root: Path, most: int) -> None:
    scarce = Scarce(most)
    data = BIG * 3
    with ChannelFolder(scarce, root=str(root), patience_s=PATIENCE_S) as folder:
        save("a", data, work=folder)
        assert (scarce.refused > 0) == (most < 4)
        assert scarce.opened >= min(most, 4)
    scarce.close()
    assert (root / "a").read_bytes() == data


def test_what_is_under_way_is_bounded(work: ChannelFolder, root: Path) -> None:
    piece, count = os.urandom(1 << 20), 300

    def into(file: BinaryIO) -> None:
        for _ in range(count):
            file.write(piece)

    tracemalloc.start()
    save("a", into, work=work)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (root / "a").stat().st_size == count << 20
    # The bound of `save`, what is under way, and what a packet needs.
    assert peak < HELD + 8 * RANGE + (16 << 20)


# In the background.


@contextlib.contextmanager
def stopped(server: Server, work: ChannelFolder) -> Iterator[None]:
    """The store stands still for a while, its channels open."""
    work.stat()
    server.send(signal.SIGSTOP)
    try:
        yield
    finally:
        server.send(signal.SIGCONT)


def test_it_returns_at_once_and_is_done_when_it_is_there(
    work: ChannelFolder, server: Server, root: Path
) -> None:
    with Saver(work=work) as saver:
        with stopped(server, work):
            saving = saver.save("a", NEW)
            assert not saving.done()
            assert (saving.taken, saving.written) == (len(NEW), 0)
        saved = saving.result(timeout=60)
        assert (root / "a").read_bytes() == NEW
        assert saving.written == saved.size == len(NEW)


def test_what_changes_afterwards_is_saved_as_it_was(
    work: ChannelFolder, server: Server, root: Path
) -> None:
    data = bytearray(NEW)
    with Saver(work=work) as saver:
        with stopped(server, work):
            saver.save("a", data)
            data[:] = bytes(len(data))
        saver.flush()
        assert (root / "a").read_bytes() == NEW


def test_it_waits_where_memory_is_used_up(work: ChannelFolder, server: Server, root: Path) -> None:
    held = []

    def into(file: BinaryIO) -> None:
        for start in range(0, len(BIG), RANGE):
            file.write(BIG[start : start + RANGE])
            held.append(saver.held)

    with Saver(bound=2 * RANGE, work=work) as saver:
        thread = threading.Thread(target=saver.save, args=("b", into))
        with stopped(server, work):
            saver.save("a", bytes(RANGE))
            thread.start()
            wait_for("the first piece", lambda: len(held) == 1)
        thread.join(timeout=60)
    assert max(held) == 2 * RANGE
    assert (root / "b").read_bytes() == BIG


def test_only_a_save_that_has_not_begun_is_superseded(
    work: ChannelFolder, server: Server, root: Path
) -> None:
    with Saver(work=work) as saver:
        with stopped(server, work):
            first = saver.save("a", b"first")
            wait_for("the first save", first.running)
            passed, other = saver.save("a", b"passed"), saver.save("b", b"other")
            kept = saver.save("a", b"kept", keep=2)
            last = saver.save("a", b"last")
        done = [one.result(timeout=60) for one in (first, passed, other, kept, last)]
    assert [one.superseded for one in done] == [False, True, False, False, False]
    assert versions(root) == {"a": b"last", "a.~1~": b"kept"}


def test_many_saves_of_a_name_end_with_the_last(work: ChannelFolder, root: Path) -> None:
    with Saver(work=work) as saver:
        savings = [saver.save("a", b"%d" % number) for number in range(200)]
    assert (root / "a").read_bytes() == b"199"
    assert all(one.done() for one in savings)
    assert not savings[-1].result().superseded


def test_errors_are_told_twice_and_the_next_save_goes_on(work: ChannelFolder, root: Path) -> None:
    saver = Saver(work=work)
    bad, good = saver.save("none/a", BIG), saver.save("a", b"good")
    assert isinstance(bad.exception(timeout=60), WorkNotFoundError)
    good.result(timeout=60)
    with pytest.raises(WorkNotFoundError):
        saver.flush()
    saver.flush()
    saver.save("none/b", b"x")
    with pytest.raises(WorkNotFoundError):
        saver.close()
    assert (root / "a").read_bytes() == b"good"
    with pytest.raises(ValueError, match="was closed"):
        saver.save("a", b"x")


def fail_while_saving(work: ChannelFolder) -> None:
    with Saver(work=work) as saver:
        saver.save("none/a", b"x")
        raise ZeroDivisionError


def test_an_error_of_the_body_is_not_covered_by_one_of_a_save(work: ChannelFolder) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        fail_while_saving(work)
    assert "A save failed as well: none: is not there" in caught.value.__notes__[0]


def test_a_function_that_fails_saves_nothing(work: ChannelFolder, root: Path) -> None:
    save("a", OLD, work=work)

    def into(file: BinaryIO) -> None:
        file.write(BIG)
        raise RuntimeError("no more")

    with Saver(work=work) as saver:
        with pytest.raises(RuntimeError, match="no more"):
            saver.save("a", into)
        saver.flush()
    assert load("a", work=work) == OLD
    assert not parts(root)


def test_what_is_cancelled_leaves_the_old_file(
    work: ChannelFolder, server: Server, root: Path
) -> None:
    save("a", OLD, work=work)
    with Saver(work=work) as saver:
        with stopped(server, work):
            first = saver.save("a", NEW)
            wait_for("the first save", first.running)
            second = saver.save("b", NEW)
            assert first.cancel()
            assert second.cancel()
            assert second.cancelled()
        with pytest.raises(CancelledError):
            first.result(timeout=60)
        saver.flush()
    assert load("a", work=work) == OLD
    assert set(versions(root, "")) == {"a", ".a.sha256"}


@pytest.fixture
def lost(root: Path) -> Iterator[tuple[Cutter, ChannelFolder]]:
    """A work folder whose store goes in the middle of a large file, and is waited for for ever."""
    cutter = Cutter(towards_store=True, after=len(BIG) // 2, comes_back=False)
    with (
        contextlib.closing(cutter),
        ChannelFolder(cutter, root=str(root), patience_s=math.inf) as folder,
    ):
        yield cutter, folder


def test_what_is_cancelled_in_a_cut_ends_at_once(
    lost: tuple[Cutter, ChannelFolder], root: Path
) -> None:
    cutter, work = lost
    (root / "a").write_bytes(OLD)
    with Saver(work=work) as saver:
        saving = saver.save("a", BIG)
        wait_for("the cut", lambda: cutter.gone)
        assert saving.cancel()
        with pytest.raises(CancelledError):
            saving.result(timeout=20)
        saver.flush()
    assert (root / "a").read_bytes() == OLD


@pytest.mark.parametrize("waits", ["save", "the end"])
def test_ctrl_c_in_a_cut_ends_the_waiting(
    lost: tuple[Cutter, ChannelFolder], root: Path, waits: str
) -> None:
    cutter, work = lost
    (root / "a").write_bytes(OLD)

    me = threading.get_ident()

    def waiting() -> bool:
        stack = traceback.extract_stack(sys._current_frames()[me])
        return cutter.gone and "flush" in [call.name for call in stack]

    def interrupt() -> None:
        # Before, in the loop, it would not be this waiting that it ends.
        wait_for("the waiting in a cut", waiting)
        os.kill(os.getpid(), signal.SIGINT)

    def act() -> None:
        if waits == "save":
            save("a", BIG, work=work)
            return
        with Saver(work=work) as saver:
            saver.save("a", BIG)

    impatient = threading.Thread(target=interrupt)
    with heeding_ctrl_c():
        impatient.start()
        with pytest.raises(KeyboardInterrupt):
            act()
    impatient.join()
    assert (root / "a").read_bytes() == OLD
    assert not [one for one in threading.enumerate() if one.name == "kakehashi saver"]


def test_every_version_that_is_kept_can_be_loaded(work: ChannelFolder) -> None:
    with Saver(work=work) as saver:
        for number in range(40):
            saver.save("a", b"%d" % number, keep=40).result()
    assert load("a.~1~", work=work) == b"0"
    assert load("a", work=work) == b"39"


def test_what_is_written_twice_counts_once(root: Path) -> None:
    # Answers to half of the reading back, so that what was written is written again.
    cutter = Cutter(towards_store=False, after=RANGE // 2)
    with (
        contextlib.closing(cutter),
        ChannelFolder(cutter, root=str(root), patience_s=PATIENCE_S) as folder,
        Saver(work=folder) as saver,
    ):
        saving = saver.save("a", BIG)
        assert saving.result().size == len(BIG)
        assert cutter.after is None, "the control: there was a cut"
        assert saving.written == len(BIG)


def test_without_a_thread_it_goes_on_in_its_own(
    work: ChannelFolder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    few = SimpleNamespace(Thread=Refused, Condition=threading.Condition)
    monkeypatch.setattr(upload, "threading", few)
    monkeypatch.setattr(upload, "HELD", 2 * RANGE)
    with work.begin("a") as incoming:
        for at in range(0, len(BIG), RANGE):
            incoming.feed(BIG[at : at + RANGE])
        incoming.commit()
    assert (root / "a").read_bytes() == BIG


# Kill -9.


LOOP = """
import sys
from pathlib import Path
from kakehashi.link import Saver
from kakehashi.link.workchannel import ChannelFolder
root, socket, keep = sys.argv[1:]
with Saver(work=ChannelFolder.on_socket(Path(socket), root=root)) as saver:
    for number in range(1, 10_000):
        data = number.to_bytes(4, "big") * 500_000
        saver.save("a", data, keep=int(keep)).result()
        print(number, flush=True)
"""


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("lines", [1, 4, 9])
def test_what_was_acknowledged_is_there_after_kill_9(
    root: Path, tmp_path: Path, work: ChannelFolder, keep: int, lines: int
) -> None:
    broker = Broker(tmp_path / "work.sock", [SFTP_SERVER])
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(root), str(broker.path), str(keep)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    for _ in range(lines):
        told = process.stdout.readline()
    process.kill()
    told = (process.stdout.read().split() or [told])[-1]
    process.wait(timeout=10)
    broker.close()
    found = load("a", work=work)
    number = int.from_bytes(found[:4], "big")
    assert found == number.to_bytes(4, "big") * 500_000
    assert number in (int(told), int(told) + 1)
    save("a", NEW, work=work)
    assert load("a", work=work) == NEW


def test_what_a_killed_one_left_is_swept_after_a_day(work: ChannelFolder, root: Path) -> None:
    left = [root / part_name() for _ in range(2)]
    for path in left:
        path.write_bytes(NEW)
    os.utime(left[0], (1, 1))
    save("a", NEW, work=work)
    assert [path.exists() for path in left] == [False, True]


# A full disk.


def test_a_full_disk_is_said_and_the_old_file_stays(tmp_path: Path, server: Server) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    root = tmp_path / "small"
    root.mkdir()
    with contextlib.ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(root)], check=True)
        stack.callback(subprocess.run, ["umount", str(root)], check=True)
        stack.callback(server.close)
        work = stack.enter_context(ChannelFolder(server, root=str(root), patience_s=PATIENCE_S))
        save("a", OLD, keep=2, work=work)
        for what in (BIG, lambda file: file.write(BIG)):
            with pytest.raises(WorkFullError, match="disk is full"):
                save("a", what, keep=2, work=work)
            assert load("a", work=work) == OLD
            assert not parts(root)
        save("a", NEW, keep=2, work=work)
        assert load("a", work=work) == NEW


# Real files, through sshd, with the connections cut.


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd's chroot needs root")
def test_a_database_and_a_notebook_through_cut_connections(
    tmp_path: Path, public_folder: Path
) -> None:
    (public_folder / "work").mkdir(mode=0o700)
    database = tmp_path / "results.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as made, made:
        made.execute("CREATE TABLE results (series TEXT, blob BLOB)")
        rows = [(f"1.2.{number}", random_bytes(100_000, number)) for number in range(300)]
        made.executemany("INSERT INTO results VALUES (?, ?)", rows)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("# " + "x" * 9_000_000)])
    files = {"results.sqlite": database.read_bytes(), "a.ipynb": nbformat.writes(notebook).encode()}
    sshd = Sshd(tmp_path, public_folder, "-u 0007")
    over = threading.Event()

    def cut() -> None:
        """Cut every connection each time when a few more megabytes have arrived."""
        last = 0
        while not over.wait(0.01):
            with contextlib.suppress(OSError):
                now = sum(path.stat().st_size for path in (public_folder / "work").iterdir())
                if now > last + 5_000_000:
                    last = now
                    sshd.cut()

    cutting = threading.Thread(target=cut)
    with contextlib.closing(sshd), ChannelFolder(sshd, patience_s=120) as work:
        cutting.start()
        try:
            with Saver(work=work) as saver:
                for name, data in files.items():
                    saver.save(name, data)
        finally:
            over.set()
            cutting.join()
        for name, data in files.items():
            assert (public_folder / "work" / name).read_bytes() == data
            assert load(name, work=work) == data
        assert len(sshd._clients) > 4, "nothing was cut"
    with contextlib.closing(sqlite3.connect(public_folder / "work/results.sqlite")) as found:
        assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert found.execute("SELECT * FROM results").fetchall() == rows
    assert json.loads((public_folder / "work/a.ipynb").read_text())["cells"]
