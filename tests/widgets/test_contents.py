"""Saves are whole or not at all, over a real sshfs, whatever kills the saver."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tornado.web import HTTPError

from kakehashi_widgets.contents import WholeFileContentsManager, sweep, write_whole
from tests.link.stores import SFTP_SERVER

WHOLE = "kakehashi_widgets.contents.WholeFileContentsManager"
STOCK = "jupyter_server.services.contents.largefilemanager.AsyncLargeFileManager"
HOLD_AT = 2 << 20


def notebook(text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_raw_cell(text)])


def partials(folder: Path) -> list[Path]:
    return list(folder.glob(".~*.part"))


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"


@pytest.fixture
def manager(tmp_path: Path) -> WholeFileContentsManager:
    return WholeFileContentsManager(root_dir=str(tmp_path))


def save(manager: WholeFileContentsManager, model: dict[str, Any], path: str) -> dict[str, Any]:
    return asyncio.run(manager.save(model, path))


@given(st.binary(max_size=300))
def test_a_file_comes_back_as_it_was_saved(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        manager = WholeFileContentsManager(root_dir=folder)
        content = base64.encodebytes(data).decode()
        save(manager, {"type": "file", "format": "base64", "content": content}, "a")
        assert (Path(folder) / "a").read_bytes() == data


@given(st.text(max_size=200))
def test_a_notebook_comes_back_as_it_was_saved(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        manager = WholeFileContentsManager(root_dir=folder)
        try:
            text.encode()
        except UnicodeEncodeError:
            return
        save(manager, {"type": "notebook", "format": "json", "content": notebook(text)}, "a.ipynb")
        read = asyncio.run(manager.get("a.ipynb"))
        assert read["content"]["cells"][0]["source"] == text
        assert nbformat.read(Path(folder) / "a.ipynb", 4).cells[0].source == text


def test_nothing_temporary_is_left(manager: WholeFileContentsManager, tmp_path: Path) -> None:
    save(manager, {"type": "file", "format": "text", "content": "x"}, "a.txt")
    save(manager, {"type": "file", "format": "text", "content": "y"}, "a.txt")
    assert (tmp_path / "a.txt").read_text() == "y"
    assert not partials(tmp_path)


def test_the_mode_of_a_file_is_kept(manager: WholeFileContentsManager, tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("old")
    (tmp_path / "run.sh").chmod(0o750)
    save(manager, {"type": "file", "format": "text", "content": "new"}, "run.sh")
    assert stat.S_IMODE((tmp_path / "run.sh").stat().st_mode) == 0o750


def test_a_link_is_followed_not_replaced(manager: WholeFileContentsManager, tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    save(manager, {"type": "file", "format": "text", "content": "new"}, "link.txt")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@pytest.mark.skipif(os.geteuid() != 0, reason="root makes the file that another may not write")
def test_a_read_only_file_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    file = tmp_path / "approved.txt"
    file.write_text("old")
    file.chmod(0o444)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            write_whole(file, b"new")
        except PermissionError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert file.read_text() == "old"
    assert not partials(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    script = (
        "import resource, sys, pathlib\n"
        "from kakehashi_widgets.contents import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_whole(pathlib.Path(sys.argv[1]), b'x' * 5000)\n"
        "except OSError as error:\n    print(error.errno)\n"
    )
    file = tmp_path / "a.txt"
    file.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "27"
    assert file.read_text() == "old"
    assert not partials(tmp_path)


def test_a_large_upload_appears_whole_with_its_last_chunk(
    manager: WholeFileContentsManager, tmp_path: Path
) -> None:
    (tmp_path / "big.bin").write_bytes(b"old")
    parts = [b"one", b"two", b"three"]
    for chunk, data in zip((1, 2, -1), parts, strict=True):
        assert (tmp_path / "big.bin").read_bytes() == b"old"
        model = {
            "type": "file",
            "format": "base64",
            "chunk": chunk,
            "content": base64.b64encode(data).decode(),
        }
        answer = save(manager, model, "big.bin")
        assert answer["path"] == "big.bin"
    assert (tmp_path / "big.bin").read_bytes() == b"onetwothree"
    assert not partials(tmp_path)


def test_a_chunk_of_nothing_begun_is_refused(manager: WholeFileContentsManager) -> None:
    model = {"type": "file", "format": "text", "chunk": 2, "content": "x"}
    with pytest.raises(HTTPError, match="upload the file again"):
        save(manager, model, "a.txt")


@pytest.mark.parametrize(
    "model",
    [
        {"type": "file", "format": "base64", "content": "not base64!"},
        {"type": "file", "format": "hex", "content": "00"},
        {"type": "file", "format": "text", "content": 5},
    ],
)
def test_malformed_content_is_refused(
    manager: WholeFileContentsManager, tmp_path: Path, model: dict[str, Any]
) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(HTTPError):
        save(manager, model, "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_checkpoint_and_restore(manager: WholeFileContentsManager, tmp_path: Path) -> None:
    model = {"type": "notebook", "format": "json", "content": notebook("first")}
    save(manager, model, "a.ipynb")
    checkpoint = asyncio.run(manager.create_checkpoint("a.ipynb"))
    save(manager, {**model, "content": notebook("second")}, "a.ipynb")
    # In the work folder, so that it is there in the next session too.
    assert list(tmp_path.glob(".ipynb_checkpoints/*.ipynb"))
    asyncio.run(manager.restore_checkpoint(checkpoint["id"], "a.ipynb"))
    assert nbformat.read(tmp_path / "a.ipynb", 4).cells[0].source == "first"


def test_only_old_leftovers_are_swept(tmp_path: Path) -> None:
    fresh, stale, other = (tmp_path / n for n in (".~1.part", ".~2.part", "mine.part"))
    for path in (fresh, stale, other):
        path.write_text("x")
    for path in (stale, other):
        os.utime(path, (1, 1))
    sweep(tmp_path)
    assert fresh.exists()
    assert other.exists()
    assert not stale.exists()


class Sshfs:
    """A folder over sshfs from a real SFTP server, through a pump that can be held."""

    def __init__(self, store: Path, mount: Path) -> None:
        self.store, self.mount = store, mount
        self.free = threading.Event()
        self.free.set()
        self.hold_at: int | None = None
        self.sent = 0
        near, pump_in = socket.socketpair()
        pump_out, far = socket.socketpair()
        self._ends = [pump_in, pump_out]
        self._server = subprocess.Popen([SFTP_SERVER], stdin=far, stdout=far)
        self._sshfs = subprocess.Popen(
            [
                "/usr/bin/sshfs",
                f":{store}",
                str(mount),
                "-o",
                "passive",
                "-f",
                "-o",
                "max_write=65536",
            ],
            stdin=near,
            stdout=near,
        )
        near.close()
        far.close()
        for source, sink, counted in ((pump_in, pump_out, True), (pump_out, pump_in, False)):
            threading.Thread(target=self._pump, args=(source, sink, counted), daemon=True).start()
        wait_for(lambda: os.path.ismount(mount), "the sshfs mount")

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if counted:
                    self.sent += len(data)
                    if self.hold_at is not None and self.sent >= self.hold_at:
                        self.free.clear()
                        self.hold_at = None
                    self.free.wait()
                sink.sendall(data)

    def hold_after(self, more: int) -> None:
        """Let `more` bytes through to the store, then nothing until :attr:`free` is set."""
        self.hold_at = self.sent + more

    def close(self) -> None:
        self.free.set()
        subprocess.run(["/bin/umount", "--lazy", str(self.mount)], check=False)
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for process in (self._sshfs, self._server):
            process.kill()
            process.wait(timeout=10)


@pytest.fixture
def sshfs(tmp_path: Path) -> Iterator[Sshfs]:
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("mounting sshfs needs root and /dev/fuse")
    store, mount = tmp_path / "store", tmp_path / "work"
    store.mkdir()
    mount.mkdir()
    mounted = Sshfs(store, mount)
    yield mounted
    mounted.close()


SAVER = """
import asyncio, importlib, json, sys
module, _, name = sys.argv[1].rpartition(".")
import nbformat
manager = getattr(importlib.import_module(module), name)(root_dir=sys.argv[2])
content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_raw_cell("new " * (2 << 20))])
print("ready", flush=True)
sys.stdin.readline()
asyncio.run(manager.save({"type": "notebook", "format": "json", "content": content}, "a.ipynb"))
"""


def kill_in_mid_save(sshfs: Sshfs, manager: str) -> bytes:
    """Save over the mount, kill -9 when 2 MB are on their way; what the store then has."""
    target = sshfs.store / "a.ipynb"
    target.write_text(nbformat.writes(notebook("old")))
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, manager, str(sshfs.mount)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert saver.stdin is not None
    assert saver.stdout is not None
    try:
        assert saver.stdout.readline() == b"ready\n"
        sshfs.hold_after(HOLD_AT)
        saver.stdin.write(b"\n")
        saver.stdin.flush()
        wait_for(lambda: not sshfs.free.is_set() or saver.poll() is not None, "the held save")
        assert saver.poll() is None, "the save ended before it was held"
        saver.send_signal(signal.SIGKILL)
    finally:
        # A process that waits in a FUSE request dies only with the answer or the mount.
        sshfs.close()
        saver.kill()
        saver.wait(timeout=20)
    return target.read_bytes()


def test_kill_9_in_mid_save_over_sshfs_leaves_the_old_notebook(sshfs: Sshfs) -> None:
    left = nbformat.reads(kill_in_mid_save(sshfs, WHOLE).decode(), 4)
    assert left.cells[0].source == "old"
    # It was killed in the middle, not before: part of the new one lies there beside it.
    assert [path.stat().st_size > 0 for path in partials(sshfs.store)] == [True]


def test_the_stock_manager_is_torn_by_the_same_kill(sshfs: Sshfs) -> None:
    """The control: the same kill finds half a notebook where saves write in place."""
    with pytest.raises(json.JSONDecodeError):
        json.loads(kill_in_mid_save(sshfs, STOCK))


def test_a_save_over_sshfs_lands_whole_at_the_store(sshfs: Sshfs) -> None:
    manager = WholeFileContentsManager(root_dir=str(sshfs.mount))
    for text in ("first", "second" * 100_000):
        model = {"type": "notebook", "format": "json", "content": notebook(text)}
        save(manager, model, "a.ipynb")
        assert nbformat.read(sshfs.store / "a.ipynb", 4).cells[0].source == text
    assert not partials(sshfs.store)


def test_a_held_save_does_not_hold_the_server(sshfs: Sshfs) -> None:
    manager = WholeFileContentsManager(root_dir=str(sshfs.mount))
    model = {"type": "file", "format": "text", "content": "x" * (8 << 20)}

    async def both() -> None:
        sshfs.hold_after(HOLD_AT)
        saving = asyncio.create_task(manager.save(model, "a.txt"))
        # The event loop turns while the save hangs: this would never come otherwise.
        await asyncio.to_thread(wait_for, lambda: not sshfs.free.is_set(), "the held save")
        assert not saving.done()
        sshfs.free.set()
        await asyncio.wait_for(saving, 30)

    asyncio.run(both())
    assert (sshfs.store / "a.txt").stat().st_size == 8 << 20
