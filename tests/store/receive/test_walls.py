"""An association's process that was taken over reaches nothing but what its own caller sends."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from kakehashi.store.receive.asking import Asker
from kakehashi.store.receive.walls import missing

from .scu import data_set

# Older kernels and other processors lack what the walls are made of; CI has it.
pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine has no {missing()}")

LIBC = ctypes.CDLL(None, use_errno=True)
F_SETSIG = 10
PTRACE_PEEKDATA = 2


def open_descriptors() -> set[int]:
    found = set()
    for number in range(3, 1024):
        try:
            os.fstat(number)
        except OSError:
            continue
        found.add(number)
    return found


def traces(pid: int) -> None:
    if LIBC.ptrace(ctypes.c_long(PTRACE_PEEKDATA), pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def has_signalled(pid: int) -> None:
    ours, _theirs = socket.socketpair()
    fcntl.fcntl(ours, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(ours, fcntl.F_SETOWN, pid)


def attempts(receive: Path, journal: Path, listener: int) -> dict[str, Callable[[], object]]:
    """What a stranger would try, by name."""
    return {
        "write the journal": lambda: os.open(journal, os.O_WRONLY | os.O_APPEND),
        "read the journal": lambda: os.open(journal, os.O_RDONLY),
        "hold the journal": lambda: os.open(receive / "journal/.lock", os.O_RDWR),
        "read the inbox": lambda: os.open(receive / "inbox", os.O_RDONLY),
        "write the inbox": lambda: (receive / "inbox/new.dcm").write_bytes(b""),
        "take a name away": (receive / ".receiver").unlink,
        "write beside": lambda: (receive / "figures/x").write_bytes(b""),
        "close the inbox": lambda: (receive / "inbox").chmod(0o700),
        "cut the journal": lambda: os.truncate(journal, journal.stat().st_size),
        "link the journal": lambda: os.link(journal, receive / "incoming/1-1.part"),
        "point out": lambda: (receive / "incoming/1-1.part").symlink_to(journal),
        "kill the listener": lambda: os.kill(listener, 0),
        "kill its group": lambda: os.kill(0, 0),
        "have it killed": lambda: has_signalled(listener),
        "trace it": lambda: traces(listener),
        "read it": lambda: os.open(f"/proc/{listener}/mem", os.O_RDONLY),
        "hold it back": lambda: os.setpriority(os.PRIO_PROCESS, listener, 0),
        "call out": lambda: socket.create_connection(("127.0.0.1", 9)),
        "make another process": lambda: os.fork() or os._exit(0),
        "run a program": lambda: os.execv("/nowhere", ["nowhere"]),
    }


def tried(receive: Path, journal: Path, listener: int) -> dict[str, bool]:
    """Say of each attempt whether it was refused for want of a right."""
    refused = {}
    for name, attempt in attempts(receive, journal, listener).items():
        try:
            attempt()
        except PermissionError:
            refused[name] = True
        except OSError:
            refused[name] = False
        else:
            refused[name] = False
    return refused


def test_an_associations_process_reaches_nothing_of_its_account(run, tmp_path, monkeypatch):
    """Its account owns journal and inbox, and is the listener's own."""
    receive = tmp_path / "root/receive"
    journal = receive / f"journal/{9:020}.jsonl"
    journal.parent.mkdir(parents=True)
    journal.touch()

    def says(asker: Asker, _facility: str) -> bool:
        refused = tried(receive, journal, os.getppid())
        found = {"refused": refused, "open": sorted(open_descriptors())}
        (receive / "incoming/found").write_text(json.dumps(found))
        return True

    monkeypatch.setattr(Asker, "enter", says)
    receiver = run()
    client = receiver.call()
    client.associate()
    found = json.loads((receive / "incoming/found").read_text())
    assert [name for name, refused in found["refused"].items() if not refused] == []
    # Its connection and its channel.
    assert len(found["open"]) == 2
    assert client.store("1.2.3.4", data_set("1.2.3.4")) == 0
    client.release()
    assert [entry.sop for entry in receiver.entries()] == ["1.2.3.4"]
