"""Plant the canary's pattern in every place and form, and see whether the search finds each.

``python -I -m kakehashi.verify.selftest`` runs as root on one host, asks as the search does, and
removes all that it has planted. Standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import gzip
import json
import os
import signal
import sqlite3
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kakehashi.verify.pattern import masked
from kakehashi.verify.search import Needles, Search, marker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAME = "kakehashi-selftest"
# Where files of a session, of a scheduler, of a log or of a hub could be; those that are here.
FOLDERS = tuple(
    f"/{name}"
    for name in (
        "tmp", "var/tmp", "dev/shm", "run", "var/log", "var/spool", "var/lib", "home", "root",
        "etc", "srv", "opt", "mnt", "usr/local", "var/spool/slurmd", "var/spool/slurmctld",
        "var/lib/kakehashi",
    )
)  # fmt: skip
CLONE_NEWNS, CLONE_NEWIPC = 0x00020000, 0x08000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


def forms(needles: dict[str, bytes]) -> dict[str, bytes]:
    """Return what is written for each form: the pattern in the midst of other things."""
    around = os.urandom(3000)
    plain = needles["plain"]
    written = {name: around + needle + around for name, needle in needles.items()}
    written["packed, plain"] = around + gzip.compress(around + plain + around)
    written["packed, pixels (float32)"] = zlib.compress(around + needles["pixels (float32)"])
    for shift in range(3):
        text = base64.b64encode(b"x" * shift + plain + b"yz")
        written[f"base64, at {shift}"] = text
        written[f"base64, at {shift}, UTF-16"] = text.decode().encode("utf-16-le")
    return written


@contextmanager
def _planted_files(folder: str, written: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """Write each form into a folder; gives what must be found: path to form."""
    planted = {}
    try:
        for index, (form, data) in enumerate(written.items()):
            path = Path(folder, f"{NAME}-{index}")
            path.write_bytes(data)
            planted[str(path)] = form
        yield planted
    finally:
        for name in planted:
            Path(name).unlink(missing_ok=True)


@contextmanager
def _database(plain: bytes) -> Iterator[str]:
    path = Path("/var/tmp", f"{NAME}.sqlite")  # noqa: S108 - made and removed by root
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE cells (output BLOB)")
        database.execute("INSERT INTO cells VALUES (?)", (plain,))
        database.commit()
        try:
            yield str(path)
        finally:
            for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
                path.with_name(name).unlink(missing_ok=True)


@contextmanager
def _segment(plain: bytes) -> Iterator[str]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(0, 4096, 0o1600)
    address = libc.shmat(number, None, 0)
    ctypes.memmove(address, plain, len(plain))
    try:
        yield f"segment {number}"
    finally:
        libc.shmdt(ctypes.c_void_p(address))
        libc.shmctl(number, 0, None)


@contextmanager
def _elsewhere(act: Callable[[], object], shown: bytes = b"") -> Iterator[int]:
    """Keep a process that has done something, until told to end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            act()
            if shown:
                script = "import os, sys; os.write(int(sys.argv[1]), b'r'); sys.stdin.read()"
                os.set_inheritable(writing, True)  # noqa: FBT003 - os has no other way
                # Its standard input stays open until it is killed.
                keep, other = os.pipe()
                os.dup2(keep, 0)
                os.set_inheritable(other, True)  # noqa: FBT003 - as above
                argv = [sys.executable, "-I", "-c", script, str(writing), shown.hex()]
                os.execv(sys.executable, argv)  # noqa: S606 - an argument list, no shell
            os.write(writing, b"r")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        if os.read(reading, 1) != b"r":
            raise OSError("the process that should hold the pattern has ended")
        yield child
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _private_tmpfs(plain: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "unshare")
    if libc.mount(b"none", b"/mnt", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "mount")
    Path("/mnt", NAME).write_bytes(plain)


def _private_segment(plain: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWIPC):
        raise OSError(ctypes.get_errno(), "unshare")
    libc.shmat.restype = ctypes.c_void_p
    ctypes.memmove(libc.shmat(libc.shmget(0, 4096, 0o1600), None, 0), plain, len(plain))


def _deleted(plain: bytes) -> None:
    descriptor = os.open("/var/tmp", os.O_RDWR | os.O_TMPFILE)  # noqa: S108 - has no name
    os.write(descriptor, plain)


def _memory_file(plain: bytes) -> None:
    os.write(os.memfd_create(NAME), plain)


def controls(needles: dict[str, bytes], skip: frozenset[str]) -> list[dict[str, Any]]:
    """Plant, search, remove; returns each control with whether it turned red."""
    written = forms(needles)
    plain = needles["plain"]
    since = marker()
    expected: list[tuple[str, Callable[[dict[str, str]], bool]]] = []
    with contextlib.ExitStack() as stack:
        for folder in FOLDERS:
            if not os.access(folder, os.W_OK) or folder in skip:
                continue
            for path, form in stack.enter_context(_planted_files(folder, written)).items():
                expected.append((f"{form} in {folder}", _is(path, form)))
        expected.append(("a row of a database", _in(stack.enter_context(_database(plain)))))
        expected.append(("a System V segment", _in(stack.enter_context(_segment(plain)))))
        for name, act in (
            ("a tmpfs of another mount namespace", _private_tmpfs),
            ("a segment of another IPC namespace", _private_segment),
            ("a file that is deleted, but open", _deleted),
            ("a memory file", _memory_file),
        ):
            child = stack.enter_context(_elsewhere(lambda act=act: act(plain)))  # type: ignore[misc]
            expected.append((name, _of_process(child)))
        child = stack.enter_context(_elsewhere(lambda: None, shown=plain))
        expected.append(("a command line", _of_process(child)))
        found = Search(Needles(needles), since, skip).run()["findings"]
    return [
        {"control": name, "found": any(matches(one) for one in found)} for name, matches in expected
    ]


def _is(path: str, form: str) -> Callable[[dict[str, str]], bool]:
    return lambda found: found["path"] == path and found["encoding"] == form


def _in(text: str) -> Callable[[dict[str, str]], bool]:
    return lambda found: found["path"].startswith(text)


def _of_process(pid: int) -> Callable[[dict[str, str]], bool]:
    return lambda found: (
        found["place"].endswith(f"process {pid}") or found["path"].endswith(f"/proc/{pid}")
    )


def main() -> int:
    """Read needles, masked, on standard input; print the controls."""
    request = json.loads(sys.stdin.read())
    mask = bytes.fromhex(request["mask"])
    needles = {name: masked(bytes.fromhex(one), mask) for name, one in request["needles"].items()}
    json.dump({"controls": controls(needles, frozenset(request["skip"]))}, sys.stdout)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
