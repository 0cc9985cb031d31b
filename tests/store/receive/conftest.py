"""A receiver in a process of its own, and objects to send to it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kakehashi.store.receive import Entry, Inbox, listener
from kakehashi.store.receive.entry import HEADER_SIZE
from kakehashi.store.receive.settings import Receive, Sender

from .scu import Scu

EAST = Sender(facility="east", ae_titles=["HOSP", "STORESCU"], addresses=["127.0.0.0/8"])


def settings(**changes: object) -> Receive:
    return Receive(**({"bind": "127.0.0.1", "senders": (EAST,), "stop_s": 5} | changes))


@dataclass
class Running:
    """A receiver that runs in a child."""

    root: Path
    settings: Receive
    pid: int = 0
    port: int = 0
    _pipe: int = -1

    def start(self) -> None:
        """Start it, or start it again; on another port then."""
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(reading)
                # All that comes from the receiver has this one, whatever else it closes.
                os.dup2(writing, 0)
                logging.basicConfig(level=logging.ERROR, force=True)
                with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
                    port = server.getsockname()[1].to_bytes(2, "big")
                    listener.serve(
                        self.root, self.settings, server, lambda: os.write(writing, port)
                    )
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writing)
        if self._pipe >= 0:
            os.close(self._pipe)
        self._pipe = reading
        self.port = int.from_bytes(os.read(reading, 2), "big")
        assert self.port, "the receiver did not start"

    def end(self, number: int = signal.SIGTERM) -> int:
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def all_gone(self) -> None:
        """Wait until the associations' processes are gone too; each has an end of the pipe."""
        assert os.read(self._pipe, 1) == b""

    def call(self) -> Scu:
        return Scu(socket.create_connection(("127.0.0.1", self.port)))

    @property
    def inbox(self) -> Inbox:
        return Inbox(self.root)

    def entries(self) -> list[Entry]:
        return list(self.inbox.entries())

    def files(self, folder: str, pattern: str = "*") -> list[Path]:
        return sorted((self.root / "receive" / folder).glob(pattern))


def content(entry: Entry) -> bytes:
    """The data set as it lies there."""
    return entry.path.read_bytes()[HEADER_SIZE:]


@pytest.fixture
def run(tmp_path) -> Iterator[Callable[..., Running]]:
    """Start receivers; they are ended with the test, and must have been well then."""
    with contextlib.ExitStack() as stack:

        def start(root: Path | None = None, **changes: object) -> Running:
            folder = root or tmp_path / "root"
            folder.mkdir(exist_ok=True)
            running = Running(folder, settings(**changes))
            running.start()
            stack.callback(lambda: running.pid and _end(running))
            return running

        yield start


def _end(running: Running) -> None:
    assert running.end() == 0


@pytest.fixture
def receiver(run) -> Running:
    return run()
