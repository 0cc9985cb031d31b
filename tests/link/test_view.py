"""The view, mounted as the session wrapper mounts it, over real SFTP servers."""

from __future__ import annotations

import errno
import mmap
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kakehashi.link.tally import MINUTE, SECOND, VIEW_NAME, Tally
from tests.link.mounted import MountedView
from tests.link.stores import BLOCK, Server, StoreFolder, random_bytes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting FUSE by mount(2) needs root")


CAPLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


@contextmanager
def view_of(
    folder: StoreFolder, connect: Callable[[], socket.socket | None], sha256: str | None = None
) -> Iterator[MountedView]:
    mountpoint = folder.root.parent / "mnt"
    mountpoint.mkdir(exist_ok=True)
    view = MountedView(mountpoint, connect, folder.manifest_path, sha256 or folder.sha256, CAPLESS)
    try:
        yield view
    finally:
        view.close()


def look_into(pid: int) -> bool:
    look = [*CAPLESS, "cat", f"/proc/{pid}/environ"]
    return subprocess.run(look, capture_output=True, check=False).returncode == 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        os.sched_yield()


def test_it_shows_the_manifest_and_the_series_and_nothing_else(
    folder: StoreFolder, server: Server
) -> None:
    small, large = b"small", random_bytes(30 * BLOCK + 5)
    folder.add("1.2.3", small)
    folder.add("1.2.4", large)
    (folder.root / "series" / "9.9.ozx").write_bytes(b"another project's")
    with view_of(folder, server) as view:
        view.ready()
        assert names(view.root) == ["manifest.json", "series"]
        assert names(view.root / "series") == ["1.2.3.ozx", "1.2.4.ozx"]
        assert (view.root / "manifest.json").read_bytes() == Path(folder.manifest_path).read_bytes()
        assert (view.root / "series/1.2.3.ozx").read_bytes() == small
        assert (view.root / "series/1.2.4.ozx").read_bytes() == large
        for hidden in ("series/9.9.ozx", "series/1.2.3.blocks", "series/none.ozx", "x"):
            with pytest.raises(FileNotFoundError):
                (view.root / hidden).stat()
            with pytest.raises(FileNotFoundError):
                (view.root / hidden).read_bytes()
        status = (view.root / "series/1.2.4.ozx").stat()
        assert status.st_size == len(large)
        assert status.st_mtime == 946_684_800
        assert status.st_mode & 0o777 == 0o400
        with (
            (view.root / "series/1.2.4.ozx").open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        ):
            assert mapped[5 * BLOCK - 3 : 5 * BLOCK + 3] == large[5 * BLOCK - 3 : 5 * BLOCK + 3]


def test_it_tells_what_was_read_below_it(folder: StoreFolder, server: Server) -> None:
    data = random_bytes(30 * BLOCK + 5)
    path = folder.add("1.2.3", data)

    def told(view: MountedView) -> int:
        found = Tally.of((view.root / VIEW_NAME).read_bytes())
        assert found is not None
        assert sum(one.bytes for one in found.read(MINUTE)) == sum(
            one.bytes for one in found.read(SECOND)
        )
        return sum(one.bytes for one in found.read(SECOND))

    with view_of(folder, server) as view:
        view.ready()
        assert told(view) == 0
        assert (view.root / path).read_bytes() == data
        # And the list of its hashes.
        assert told(view) == len(data) + 31 * 32
        with pytest.raises(OSError, match="Read-only"):
            (view.root / VIEW_NAME).write_bytes(b"")
        assert VIEW_NAME not in names(view.root)


def test_nothing_can_be_written(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", b"data")
    with view_of(folder, server) as view:
        view.ready()
        file = view.root / path
        attempts: list[Callable[[], object]] = [
            lambda: (view.root / "new").write_bytes(b"x"),
            (view.root / "series/new").mkdir,
            lambda: file.open("r+b"),
            lambda: file.open("ab"),
            lambda: file.write_bytes(b"x"),
            lambda: os.truncate(file, 0),
            file.unlink,
            lambda: file.rename(view.root / "other"),
            lambda: (view.root / "link").symlink_to("x"),
            lambda: os.link(file, view.root / "hard"),
            lambda: file.chmod(0o777),
            lambda: os.chown(file, 1, 1),
            lambda: os.utime(file, (0, 0)),
            lambda: os.setxattr(file, "user.x", b"y"),
            lambda: os.mkfifo(view.root / "fifo"),
            (view.root / "series").rmdir,
        ]
        for attempt in attempts:
            with pytest.raises(OSError, match="Read-only") as caught:
                attempt()
            assert caught.value.errno == errno.EROFS
        assert file.read_bytes() == b"data"


def test_another_account_reads_nothing(public_folder: Path, server: Server) -> None:
    folder = StoreFolder(public_folder / "store")
    path = folder.add("1.2.3", b"data")
    (public_folder / "beside").write_bytes(b"for all")
    with view_of(folder, server) as view:
        view.ready()
        mountpoint = public_folder / "mnt"
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

        def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["nsenter", "-t", str(view.holder_pid), "-m", *command],
                capture_output=True,
                text=True,
                check=False,
            )

        assert run("cat", mountpoint / path).stdout == "data"
        assert run(*nobody, "cat", public_folder / "beside").stdout == "for all"
        for command in (
            ("cat", mountpoint / path),
            ("ls", mountpoint),
            ("ls", mountpoint / "series"),
            ("cat", mountpoint / "manifest.json"),
        ):
            refused = run(*nobody, *command)
            assert refused.returncode != 0
            assert "Permission denied" in refused.stderr


def test_a_block_that_cannot_be_verified_is_an_error(folder: StoreFolder, server: Server) -> None:
    data = random_bytes(40 * BLOCK)
    path = folder.add("1.2.3", data)
    changed = bytearray(data)
    changed[20 * BLOCK + 7] ^= 0x40
    (folder.root / path).write_bytes(changed)
    with view_of(folder, server) as view:
        view.ready()
        with (view.root / path).open("rb", buffering=0) as file:
            with pytest.raises(OSError, match="Input/output") as caught:
                os.pread(file.fileno(), BLOCK, 20 * BLOCK)
            assert caught.value.errno == errno.EIO
            got = bytearray()

            def read_on() -> None:
                while piece := file.read(BLOCK):
                    got.extend(piece)

            with pytest.raises(OSError, match="Input/output"):
                read_on()
            assert got == data[: len(got)], "not one wrong byte before the error"
            assert len(got) <= 20 * BLOCK
            after = os.pread(file.fileno(), BLOCK, 30 * BLOCK)
            assert after == data[30 * BLOCK : 31 * BLOCK]


@pytest.mark.parametrize("left", [0, 5 * BLOCK + 1])
def test_a_truncated_file_is_an_error(folder: StoreFolder, server: Server, left: int) -> None:
    path = folder.add("1.2.3", random_bytes(10 * BLOCK))
    os.truncate(folder.root / path, left)
    with view_of(folder, server) as view:
        view.ready()
        with pytest.raises(OSError, match="Input/output"):
            (view.root / path).read_bytes()


def test_a_changed_list_of_hashes_is_an_error_at_opening(
    folder: StoreFolder, server: Server
) -> None:
    path = folder.add("1.2.3", random_bytes(30 * BLOCK))
    (folder.root / path).with_suffix(".blocks").write_bytes(bytes(30 * 32))
    with view_of(folder, server) as view:
        view.ready()
        with pytest.raises(OSError, match="Input/output"):
            (view.root / path).open("rb")


def test_another_manifest_than_the_grants_is_refused(folder: StoreFolder, server: Server) -> None:
    folder.add("1.2.3", b"x")
    with view_of(folder, server, sha256="1" * 64) as view:
        assert "the manifest's SHA-256 is" in view.failure()
        assert view.process.wait(timeout=10) == 1


def test_a_closed_link_is_told_at_the_start(folder: StoreFolder) -> None:
    folder.add("1.2.3", b"x")
    with view_of(folder, lambda: None) as view:
        assert "closed" in view.failure()
        assert view.process.wait(timeout=10) == 1


def test_servers_killed_while_it_reads_show_as_nothing(folder: StoreFolder, server: Server) -> None:
    data = random_bytes(300 * BLOCK)
    path = folder.add("1.2.3", data)
    with view_of(folder, server) as view:
        view.ready()
        got = bytearray()
        with (view.root / path).open("rb", buffering=0) as file:
            while piece := file.read(BLOCK):
                got += piece
                if len(got) // BLOCK % 40 == 10:
                    server.kill()
        assert got == data
        assert view.channels > 4


def test_many_processes_read_the_right_bytes_at_once(folder: StoreFolder, server: Server) -> None:
    paths = [folder.add(f"1.2.{n}", random_bytes(40 * BLOCK + n, seed=n)) for n in range(3)]
    with view_of(folder, server) as view:
        view.ready()

        def work(seed: int) -> None:
            pick = random.Random(seed)
            for _ in range(25):
                path = pick.choice(paths)
                data = folder.contents[path]
                offset, length = pick.randrange(len(data)), pick.randrange(4 * BLOCK)
                with (view.root / path).open("rb", buffering=0) as file:
                    got = os.pread(file.fileno(), length, offset)
                assert got == data[offset : offset + length]

        with ThreadPoolExecutor(12) as pool:
            for done in [pool.submit(work, seed) for seed in range(12)]:
                done.result(timeout=60)


def test_reads_overlap(folder: StoreFolder) -> None:
    """While one read waits for the store, another file can be read and listed."""
    slow = folder.add("1.2.3", random_bytes(30 * BLOCK))
    fast = folder.add("1.2.4", random_bytes(BLOCK, seed=2))
    slow_hashes = (folder.root / slow).with_suffix(".blocks").read_bytes()
    held, release = threading.Event(), threading.Event()

    def hold_back(channel: int, at: int, piece: bytes) -> bytes:
        if slow_hashes in piece:
            held.set()
            release.wait(20)
        return piece

    with (
        closing(Server(hold_back)) as server,
        view_of(folder, server) as view,
        ThreadPoolExecutor(1) as pool,
    ):
        view.ready()
        first = pool.submit((view.root / slow).read_bytes)
        assert held.wait(20)
        assert (view.root / fast).read_bytes() == folder.contents[fast]
        assert len(names(view.root / "series")) == 2
        assert not first.done()
        release.set()
        assert first.result(timeout=20) == folder.contents[slow]


def test_a_process_that_waits_for_a_lost_store_can_be_killed(
    folder: StoreFolder, server: Server
) -> None:
    path = folder.add("1.2.3", random_bytes(BLOCK))
    silent: list[socket.socket] = []

    def connect() -> socket.socket:
        if not view_is_ready.is_set():
            return server()
        near, far = socket.socketpair()
        silent.append(far)
        return near

    view_is_ready = threading.Event()
    with view_of(folder, connect) as view:
        view.ready()
        view_is_ready.set()
        reading = subprocess.Popen(["cat", str(view.root / path)], stdout=subprocess.DEVNULL)
        until(lambda: bool(silent))
        assert reading.poll() is None
        reading.kill()
        assert reading.wait(timeout=10) == -signal.SIGKILL
    for end in silent:
        end.close()


def test_it_ends_with_its_socket_and_nothing_sooner(folder: StoreFolder, server: Server) -> None:
    path = folder.add("1.2.3", b"data")
    with view_of(folder, server) as view:
        view.ready()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            view.process.send_signal(number)
        assert (view.root / path).read_bytes() == b"data"
        assert view.process.poll() is None
        view.close_control()
        assert view.process.wait(timeout=10) == 0
        with pytest.raises(OSError, match="not connected"):
            names(view.root)


def test_it_dies_with_its_parent() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(20)
    report, told = os.pipe()
    parent = os.fork()
    if parent == 0:
        signal.alarm(60)  # should the test fail, nothing stays
        child = os.fork()
        if child == 0:
            os.set_inheritable(far.fileno(), True)
            fuse = os.open("/dev/fuse", os.O_RDWR)
            os.set_inheritable(fuse, True)
            command = [sys.executable, "-m", "kakehashi.link.view", "--uid", "0", "--gid", "0"]
            command += ["--fuse-fd", str(fuse), "--channel-fd", str(far.fileno())]
            os.execv(sys.executable, [*command, "--manifest-sha256", "0" * 64])
        os.write(told, str(child).encode())
        signal.pause()
        os._exit(0)
    far.close()
    child = int(os.read(report, 32))
    view = os.pidfd_open(child)
    assert near.recv(10) == b"c", "it runs, and asks for its first channel"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert select.select([view], [], [], 10)[0], "the view outlived its parent"
    for end in (report, told, view):
        os.close(end)
    near.close()


def test_it_leaves_no_core_and_no_other_process_of_the_account_looks_in(
    folder: StoreFolder, server: Server
) -> None:
    folder.add("1.2.3", b"data")
    with view_of(folder, server) as view:
        view.ready()
        process = Path(f"/proc/{view.process.pid}")
        limits = (process / "limits").read_text(encoding="ascii")
        core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]
        # As root without privileges, i.e. like any account among its own processes.
        with subprocess.Popen([*CAPLESS, "cat"], stdin=subprocess.PIPE) as other:
            # Open once setpriv has given its privileges away: the check sees what is open.
            until(lambda: look_into(other.pid))
            assert not look_into(view.process.pid)
