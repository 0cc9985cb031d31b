"""The work folder through a real SFTP server, with the channel cut anywhere."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import signal
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakehashi.errors import LinkClosedError, SessionError
from kakehashi.link import WorkFolder
from kakehashi.link.sftpwrite import WritingSftp
from kakehashi.link.work import (
    WorkDeniedError,
    WorkError,
    WorkExistsError,
    WorkFullError,
    WorkLostError,
    WorkNotFoundError,
    is_part,
    part_name,
)
from kakehashi.link.workchannel import ChannelFolder
from tests.link.chroot import SYSTEM
from tests.link.stores import SFTP_SERVER, Broker, Server, parts, random_bytes, work_server
from tests.link.test_session import write as write_session

PATIENCE_S = 10.0
SERVER_WRITES = True
OLD, NEW = b"old " * 1000, random_bytes(700_000)


class Cutter(Server):
    """Cuts every channel when so many bytes went one way; then the store is back, or not."""

    def __init__(self, towards_store: bool, after: int | None, *, comes_back: bool = True) -> None:
        super().__init__(lambda *_: None, writes=True)
        self.towards_store, self.after, self.comes_back = towards_store, after, comes_back
        self.passed = {True: 0, False: 0}
        self.gone = False
        self._count = threading.Lock()

    def __call__(self) -> socket.socket:
        channel = super().__call__()
        # Asked last: it is gone before the servers are killed, so that none outlives them.
        if self.gone:
            channel.close()
            raise ConnectionRefusedError("the store is gone")
        return channel

    def _pass_on(self, source: socket.socket, sink: socket.socket, number: int | None) -> None:
        way = number is None
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with self._count:
                    left = None if self.after is None else self.after - self.passed[way]
                    cut = left is not None and way == self.towards_store and left <= len(data)
                    if cut:
                        data, self.after = data[:left], None
                        self.gone = not self.comes_back
                    self.passed[way] += len(data)
                sink.sendall(data)
                if cut:
                    self.kill()
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def channel(root: Path, server: Server) -> Iterator[ChannelFolder]:
    with ChannelFolder(server, root=str(root), patience_s=PATIENCE_S) as folder:
        yield folder


@pytest.mark.parametrize("data", [b"", b"x", NEW, b"\0" * (9 << 20)])
def test_what_is_written_is_there_and_comes_back(
    channel: ChannelFolder, root: Path, data: bytes
) -> None:
    (root / "hanako").mkdir()
    channel.write("hanako/結果.bin", data)
    assert (root / "hanako" / "結果.bin").read_bytes() == data
    assert channel.read("hanako/結果.bin") == data
    channel.write("hanako/結果.bin", OLD)
    assert channel.read("hanako/結果.bin") == OLD
    assert not parts(root)


def test_a_listing_says_what_everything_is(channel: ChannelFolder, root: Path) -> None:
    (root / "b.txt").write_bytes(b"12345")
    os.utime(root / "b.txt", (1_700_000_000, 1_700_000_000))
    (root / "a").mkdir(mode=0o755)
    (root / "to_b").symlink_to("b.txt")
    (root / "to_nothing").symlink_to("none")
    os.mkfifo(root / "pipe")
    (root / os.fsdecode(b"odd\xff")).write_bytes(b"")
    found = {entry.name: entry for entry in channel.listdir()}
    assert list(found) == sorted(found)
    kinds = {name: entry.kind for name, entry in found.items()}
    assert kinds == {
        "a": "folder",
        "b.txt": "file",
        os.fsdecode(b"odd\xff"): "file",
        "pipe": "other",
        "to_b": "file",
        "to_nothing": "link",
    }
    assert found["b.txt"].size == found["to_b"].size == 5
    assert found["b.txt"].modified == dt.datetime.fromtimestamp(1_700_000_000, dt.UTC)
    assert channel.stat("a").kind == "folder"
    assert channel.stat().kind == "folder"
    assert channel.stat("b.txt") == found["b.txt"]
    assert channel.read(os.fsdecode(b"odd\xff")) == b""
    with pytest.raises(WorkError, match="is no file"):
        channel.read("pipe")


def test_a_folder_of_many(channel: ChannelFolder, root: Path) -> None:
    names = {f"{number:04}-{'x' * 200}" for number in range(1500)}
    for name in names:
        (root / name).touch()
    assert {entry.name for entry in channel.listdir()} == names


def test_folders_are_made_renamed_and_removed(channel: ChannelFolder, root: Path) -> None:
    channel.mkdir("a")
    (root / "a/out").symlink_to(root.parent)
    channel.mkdir("a/b")
    with pytest.raises(WorkExistsError):
        channel.mkdir("a")
    with pytest.raises(WorkNotFoundError):
        channel.mkdir("none/b")
    channel.write("a/b/x.txt", b"x")
    channel.rename("a", "c")
    assert (root / "c/b/x.txt").read_bytes() == b"x"
    with pytest.raises(WorkError, match="not empty"):
        channel.remove("c")
    channel.remove("c", recursive=True)
    assert list(root.iterdir()) == []
    assert root.parent.exists()
    with pytest.raises(WorkNotFoundError):
        channel.remove("c")


def test_a_rename_replaces_nothing(channel: ChannelFolder, root: Path) -> None:
    channel.write("a", b"a")
    channel.write("b", b"b")
    with pytest.raises(WorkExistsError):
        channel.rename("a", "b")
    with pytest.raises(WorkNotFoundError):
        channel.rename("none", "c")
    with pytest.raises(WorkNotFoundError):
        channel.rename("a", "none/c")
    channel.rename("a", "c")
    assert {path.name: path.read_bytes() for path in root.iterdir()} == {"b": b"b", "c": b"a"}


def test_a_copy_is_another_file(channel: ChannelFolder, root: Path) -> None:
    data = random_bytes(9_000_000)
    (root / "a").write_bytes(data)
    channel.copy("a", "b")
    channel.write("a", b"changed")
    assert (root / "b").read_bytes() == data
    with pytest.raises(WorkNotFoundError):
        channel.copy("none", "c")
    assert not parts(root)


def test_the_old_files_rights_are_kept(channel: ChannelFolder, root: Path) -> None:
    (root / "run.sh").write_text("old")
    (root / "run.sh").chmod(0o750)
    channel.write("run.sh", b"new")
    assert stat.S_IMODE((root / "run.sh").stat().st_mode) == 0o750


def test_a_link_is_followed_not_replaced(channel: ChannelFolder, root: Path) -> None:
    (root / "real.txt").write_text("old")
    (root / "link.txt").symlink_to("real.txt")
    (root / "new.txt").symlink_to("later.txt")
    channel.write("link.txt", b"new")
    channel.write("new.txt", b"new")
    assert (root / "link.txt").is_symlink()
    assert (root / "real.txt").read_text() == "new"
    assert (root / "later.txt").read_text() == "new"
    channel.remove("link.txt")
    assert (root / "real.txt").exists()


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\0b", "x" * 5000, "\ud800"])
def test_a_path_that_leads_out_is_refused(channel: ChannelFolder, root: Path, path: str) -> None:
    (root / "a").mkdir()
    before = sorted(root.parent.rglob("*"))
    for call in (
        lambda: channel.write(path, b"x"),
        lambda: channel.read(path),
        lambda: channel.mkdir(path),
        lambda: channel.remove(path, recursive=True),
        lambda: channel.rename("a", path),
        lambda: channel.listdir(path),
        lambda: channel.stat(path),
    ):
        with pytest.raises(WorkError, match="not"):
            call()
    with pytest.raises(WorkError):
        channel.remove("", recursive=True)
    assert sorted(root.parent.rglob("*")) == before


def test_what_is_no_file_is_not_written(channel: ChannelFolder, root: Path) -> None:
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")
    for name in ("folder", "pipe", ""):
        with pytest.raises(WorkError, match="is no file"):
            channel.write(name, b"x")
    with pytest.raises(WorkNotFoundError):
        channel.write("none/x", b"x")
    assert not parts(root)


def test_a_name_that_is_too_long_is_an_error(channel: ChannelFolder) -> None:
    with pytest.raises(WorkError):
        channel.write("x" * 300, b"x")


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["a", "b", "..", ".", "", "日本"]), min_size=1, max_size=6))
def test_no_path_reaches_beyond_the_folder(pieces: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base, contextlib.ExitStack() as stack:
        root = Path(base, "work")
        root.mkdir()
        Path(base, "a").write_text("outside")
        server = Server(writes=True)
        stack.callback(server.close)
        work = stack.enter_context(ChannelFolder(server, root=str(root), patience_s=PATIENCE_S))
        with contextlib.suppress(WorkError):
            work.write("/".join(pieces), b"inside")
        assert {path.name for path in Path(base).iterdir()} == {"work", "a"}
        assert Path(base, "a").read_text() == "outside"


def write_over(cutter: Cutter, root: Path) -> None:
    with ChannelFolder(cutter, root=str(root), patience_s=PATIENCE_S) as folder:
        folder.write("a.bin", NEW)


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, int]:
    """How many bytes one write takes each way."""
    root = tmp_path_factory.mktemp("traffic")
    (root / "a.bin").write_bytes(OLD)
    cutter = Cutter(True, None)
    write_over(cutter, root)
    cutter.close()
    return cutter.passed


# Most of what one write says is data; what is said around it is where the steps are.
_places = st.one_of(
    st.floats(0, 1),
    st.integers(0, 3000),
    st.integers(-3000, 0),
)


def cut_point(place: float, whole: int) -> int:
    if isinstance(place, float):
        return int(place * whole)
    return max(0, min(whole, place if place >= 0 else whole + place))


@settings(max_examples=120)
@given(st.booleans(), _places)
def test_a_write_survives_a_cut_anywhere(
    traffic: dict[bool, int], towards_store: bool, place: float
) -> None:
    with tempfile.TemporaryDirectory() as base:
        root = Path(base)
        (root / "a.bin").write_bytes(OLD)
        cutter = Cutter(towards_store, cut_point(place, traffic[towards_store]))
        try:
            write_over(cutter, root)
        finally:
            cutter.close()
        assert (root / "a.bin").read_bytes() == NEW
        assert not parts(root)


@settings(max_examples=120)
@given(st.booleans(), _places)
def test_a_write_that_is_given_up_leaves_the_old_or_the_new_file(
    traffic: dict[bool, int], towards_store: bool, place: float
) -> None:
    with tempfile.TemporaryDirectory() as base:
        root = Path(base)
        (root / "a.bin").write_bytes(OLD)
        after = cut_point(place, traffic[towards_store])
        cutter = Cutter(towards_store, after, comes_back=False)
        acknowledged = False
        try:
            with ChannelFolder(cutter, root=str(root), patience_s=0.1) as folder:
                with contextlib.suppress(WorkLostError):
                    folder.write("a.bin", NEW)
                    acknowledged = True
                left = (root / "a.bin").read_bytes()
                assert left == NEW if acknowledged else left in (OLD, NEW)
                cutter.gone, cutter.comes_back, cutter.after = False, True, None
                # The next thing that is done removes what the broken write left.
                assert folder.read("a.bin") == left
                assert not parts(root)
        finally:
            cutter.close()


def test_the_cuts_do_reach_every_step(traffic: dict[bool, int], root: Path) -> None:
    """The control: with the patience taken away, cuts end a write before and after its rename."""
    ends = set()
    for after in [*range(0, 600, 12), *range(max(0, traffic[False] - 200), traffic[False], 4)]:
        (root / "a.bin").write_bytes(OLD)
        cutter = Cutter(False, after, comes_back=False)
        with ChannelFolder(cutter, root=str(root), patience_s=0) as folder:
            try:
                folder.write("a.bin", NEW)
                acknowledged = True
            except WorkLostError:
                acknowledged = False
        cutter.close()
        left = (root / "a.bin").read_bytes()
        ends.add((acknowledged, left == NEW, bool(parts(root))))
        for name in parts(root):
            (root / name).unlink()
    # Not written, with and without something beside it; written, and not known.
    assert {(False, False, False), (False, False, True), (False, True, False)} <= ends


class StepCutter(Cutter):
    """Cuts every channel instead of passing on one packet: a request, or the answer to one.

    An answer that is lost is the ugly case: what was asked for has been done.
    """

    def _pass_on(self, source: socket.socket, sink: socket.socket, number: int | None) -> None:
        way = number is None
        with contextlib.suppress(OSError), source.makefile("rb") as packets:
            while head := packets.read(4):
                data = head + packets.read(int.from_bytes(head, "big"))
                with self._count:
                    cut = way == self.towards_store and self.passed[way] == self.after
                    self.passed[way] += 1
                if cut:
                    self.kill()
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def prepare(root: Path) -> None:
    (root / "a").write_bytes(OLD)
    (root / "tree/below").mkdir(parents=True)
    (root / "tree/below/x").write_bytes(b"x")


CALLS: dict[str, tuple[Callable[[ChannelFolder], object], Callable[[Path], bool]]] = {
    "write": (
        lambda work: work.write("a", NEW),
        lambda root: (root / "a").read_bytes() == NEW,
    ),
    "write new": (
        lambda work: work.write("tree/new", NEW),
        lambda root: (root / "tree/new").read_bytes() == NEW,
    ),
    "mkdir": (lambda work: work.mkdir("new"), lambda root: (root / "new").is_dir()),
    "rename": (
        lambda work: work.rename("a", "b"),
        lambda root: (root / "b").read_bytes() == OLD and not (root / "a").exists(),
    ),
    "rename folder": (
        lambda work: work.rename("tree", "b"),
        lambda root: (root / "b/below/x").exists() and not (root / "tree").exists(),
    ),
    "remove": (lambda work: work.remove("a"), lambda root: not (root / "a").exists()),
    "tree": (
        lambda work: work.remove("tree", recursive=True),
        lambda root: not (root / "tree").exists(),
    ),
    "copy": (
        lambda work: work.copy("a", "b"),
        lambda root: (root / "b").read_bytes() == OLD == (root / "a").read_bytes(),
    ),
    "list": (lambda work: [e.name for e in work.listdir()] == ["a", "tree"] or 1 / 0, bool),
    "read": (lambda work: work.read("a") == OLD or 1 / 0, bool),
}


@pytest.mark.parametrize("towards_store", [True, False], ids=["request", "answer"])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_survives_the_loss_of_every_packet(
    tmp_path: Path, call: str, towards_store: bool
) -> None:
    act, done = CALLS[call]

    def run(after: int | None) -> int:
        root = tmp_path / f"{after}"
        root.mkdir()
        prepare(root)
        cutter = StepCutter(towards_store, after)
        try:
            with ChannelFolder(cutter, root=str(root), patience_s=PATIENCE_S) as work:
                act(work)
            assert done(root)
            assert not parts(root)
            assert (cutter.opened > 1) == (after is not None), "nothing was cut"
        finally:
            cutter.close()
        return cutter.passed[towards_store]

    packets = run(None)
    assert packets >= 2
    for after in range(packets):
        run(after)


def test_killed_servers_are_replaced(channel: ChannelFolder, server: Server, root: Path) -> None:
    for number in range(5):
        channel.write("a", b"%d" % number)
        server.kill()
    assert channel.read("a") == b"4"
    assert server.opened > 1


def test_a_server_that_falls_silent_is_replaced(
    channel: ChannelFolder, server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kakehashi.link.channels._SILENT_S", 1.0)
    channel.write("a", OLD)
    server.send(signal.SIGSTOP)
    channel.write("a", NEW)
    assert server.opened == 2
    server.send(signal.SIGCONT)
    assert channel.read("a") == NEW
    assert not parts(root)


def test_a_late_server_cannot_put_back_what_was_given_up(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename waits in a server that stands still; two writes later it moves on."""
    monkeypatch.setattr("kakehashi.link.channels._SILENT_S", 1.0)
    stopped = threading.Event()
    with ChannelFolder(server, root=str(root), patience_s=0) as work:
        rename = WritingSftp.rename

        def late(sftp: WritingSftp, old: str, new: str) -> None:
            if not stopped.is_set():
                stopped.set()
                server.send(signal.SIGSTOP)
            rename(sftp, old, new)

        monkeypatch.setattr(WritingSftp, "rename", late)
        with pytest.raises(WorkLostError):
            work.write("a", b"first")
        work.write("a", b"second")
        server.send(signal.SIGCONT)
        # It reads the request, or finds its client gone and ends: either way it is through.
        server.finish()
        assert (root / "a").read_bytes() == b"second"
        assert not parts(root)


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, server: Server) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    root = tmp_path / "small"
    root.mkdir()
    with contextlib.ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(root)], check=True)
        stack.callback(subprocess.run, ["umount", str(root)], check=True)
        stack.callback(server.close)
        with ChannelFolder(server, root=str(root), patience_s=PATIENCE_S) as folder:
            folder.write("a", OLD)
            with pytest.raises(WorkFullError, match="disk is full"):
                folder.write("a", random_bytes(2 << 20))
            assert (root / "a").read_bytes() == OLD
            assert not parts(root)
            folder.write("b", random_bytes(500_000))
            folder.remove("b")


def test_a_read_only_file_stays_as_it_is(public_folder: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("root makes the file that another may not write")
    public_folder.chmod(0o777)
    (public_folder / "approved").write_bytes(OLD)
    (public_folder / "approved").chmod(0o444)
    (public_folder / "secret").write_bytes(OLD)
    (public_folder / "secret").chmod(0)

    def as_nobody() -> socket.socket:
        near, far = socket.socketpair()
        with far:
            processes.append(
                subprocess.Popen([SFTP_SERVER], stdin=far, stdout=far, user=65534, group=65534)
            )
        return near

    processes: list[subprocess.Popen[bytes]] = []
    with ChannelFolder(as_nobody, root=str(public_folder), patience_s=PATIENCE_S) as folder:
        with pytest.raises(WorkDeniedError):
            folder.write("approved", b"new")
        with pytest.raises(WorkDeniedError):
            folder.read("secret")
        folder.write("other", b"new")
        assert not folder.stat("approved").writable
        assert folder.stat("other").writable
    for process in processes:
        process.wait(timeout=10)
    assert (public_folder / "approved").read_bytes() == OLD
    assert not parts(public_folder)


class Flipper(Server):
    """Changes one byte in so many of the blocks of data that go to the store."""

    def __init__(self, times: int) -> None:
        super().__init__(lambda *_: None, writes=True)
        self.times = times

    def _pass_on(self, source: socket.socket, sink: socket.socket, number: int | None) -> None:
        with contextlib.suppress(OSError), source.makefile("rb") as packets:
            while head := packets.read(5):
                body = bytearray(packets.read(int.from_bytes(head[:4], "big") - 1))
                if number is None and head[4] == WRITE and self.times:
                    self.times -= 1
                    body[-1] ^= 1
                sink.sendall(head + body)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


WRITE = 6


@pytest.mark.parametrize("size", [1, 700_000, 30_000_000])
def test_what_the_store_holds_wrong_is_written_again(root: Path, size: int) -> None:
    data = random_bytes(size)
    flipper = Flipper(2)
    with ChannelFolder(flipper, root=str(root), patience_s=PATIENCE_S) as folder:
        folder.write("a", data)
    flipper.close()
    assert flipper.times == 0
    assert (root / "a").read_bytes() == data
    assert not parts(root)


def test_what_the_store_holds_wrong_again_and_again_is_not_acknowledged(root: Path) -> None:
    (root / "a").write_bytes(OLD)
    flipper = Flipper(1 << 30)
    with ChannelFolder(flipper, root=str(root), patience_s=PATIENCE_S) as folder:
        with pytest.raises(WorkError, match="not what was written"):
            folder.write("a", NEW)
        assert (root / "a").read_bytes() == OLD
        assert not parts(root)
    flipper.close()


def test_pieces_that_changed_at_the_store_are_not_acknowledged(
    channel: ChannelFolder, root: Path
) -> None:
    (root / "a").write_bytes(OLD)
    with channel.begin("a") as incoming:
        incoming.write(NEW)
        (part,) = [root / name for name in parts(root)]
        with part.open("r+b") as file:
            file.seek(600_000)
            file.write(b"!")
        with pytest.raises(WorkError, match="not what was written"):
            incoming.commit()
    assert (root / "a").read_bytes() == OLD
    assert not parts(root)


def test_pieces_appear_together(channel: ChannelFolder, root: Path) -> None:
    with channel.begin("a") as incoming:
        for piece in (b"one", b"two", b"three"):
            incoming.write(piece)
            assert not (root / "a").exists()
        incoming.commit()
    assert (root / "a").read_bytes() == b"onetwothree"
    with channel.begin("a") as incoming:
        incoming.write(b"never")
    assert (root / "a").read_bytes() == b"onetwothree"
    assert not parts(root)


def test_only_old_leftovers_are_swept(channel: ChannelFolder, root: Path) -> None:
    fresh, stale, other = root / part_name(), root / part_name(), root / "mine.part"
    for path in (fresh, stale, other):
        path.write_text("x")
    for path in (stale, other):
        os.utime(path, (1, 1))
    channel.sweep()
    assert fresh.exists()
    assert other.exists()
    assert not stale.exists()


def test_many_threads_share_one_folder(channel: ChannelFolder, root: Path, server: Server) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(6):
                data = random_bytes(50_000, seed=100 * number + turn)
                channel.write(f"{number}", data)
                channel.write("shared", data)
                assert channel.read(f"{number}") == data
                assert len(channel.read("shared")) == 50_000
                if turn == 3 and number == 0:
                    server.kill()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert not parts(root)


def test_outside_of_a_session_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="only available inside"):
        WorkFolder.current(tmp_path / "none.json")


def test_the_current_folder_is_the_sessions(tmp_path: Path, root: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a server with a root of its own needs root")
    path = tmp_path / "work.sock"
    broker = Broker(path, work_server(root))
    session = write_session(tmp_path, work_socket=str(path))
    with WorkFolder.current(session) as folder:
        folder.mkdir("hanako")
        folder.write("hanako/a", NEW)
        assert (root / "hanako/a").read_bytes() == NEW
        (root / "root").symlink_to("/")
        # A link leads nowhere but to what that server has.
        assert {entry.name for entry in folder.listdir("root")} <= {*SYSTEM, "work"}
        broker.close()
        with pytest.raises(LinkClosedError, match="the session has ended"):
            folder.listdir()


def test_after_closing_it_says_so(channel: ChannelFolder) -> None:
    channel.mkdir("a")
    channel.close()
    with pytest.raises(LinkClosedError, match="was closed"):
        channel.mkdir("b")


def test_after_a_fork_it_says_so(channel: ChannelFolder) -> None:
    channel.mkdir("a")
    child = os.fork()
    if child == 0:
        try:
            channel.mkdir("b")
        except WorkError as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    channel.mkdir("c")


def test_a_server_that_cannot_replace_files_is_refused(root: Path) -> None:
    def poor() -> socket.socket:
        near, far = socket.socketpair()
        with far:
            processes.append(
                subprocess.Popen([SFTP_SERVER, "-P", "posix-rename"], stdin=far, stdout=far)
            )
        return near

    processes: list[subprocess.Popen[bytes]] = []
    with (
        ChannelFolder(poor, root=str(root), patience_s=PATIENCE_S) as folder,
        pytest.raises(LinkClosedError, match="posix-rename"),
    ):
        folder.write("a", b"x")
    for process in processes:
        process.wait(timeout=10)


def test_a_part_is_what_it_says() -> None:
    assert is_part(part_name())
    assert part_name() != part_name()
    assert not is_part("mine.part")
    assert not is_part(".~xyz.part")
