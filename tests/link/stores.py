"""Stores to read from: a folder as the store makes it, behind a real SFTP server."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kakehashi.link.work import is_part

SFTP_SERVER = "/usr/lib/openssh/sftp-server"
CHROOT = Path(__file__).with_name("chroot.py")
BLOCK = 131072


@dataclass
class StoreFolder:
    """A project's view at the store."""

    root: Path
    block_size: int = BLOCK
    sha256: str = ""
    contents: dict[str, bytes] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def manifest_path(self) -> str:
        return str(self.root / "manifest.json")

    def add(self, uid: str, data: bytes, **series: Any) -> str:
        path = f"series/{uid}.ozx"
        self.contents[path] = data
        self.rows[path] = series
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        size = self.block_size
        hashes = b"".join(
            hashlib.sha256(data[at : at + size]).digest() for at in range(0, len(data), size)
        )
        file.with_suffix(".blocks").write_bytes(hashes)
        self.publish()
        return path

    def publish(self) -> None:
        files = [
            {
                "path": path,
                "size": len(data),
                "blocks": hashlib.sha256(
                    (self.root / path).with_suffix(".blocks").read_bytes()
                ).hexdigest(),
                "series": self.rows[path],
            }
            for path, data in self.contents.items()
        ]
        raw = json.dumps(
            {
                "kakehashi_manifest": 1,
                "project": "lung",
                "cohort": {"version": 1, "sha256": "0" * 64},
                "block_size": self.block_size,
                "files": files,
            }
        ).encode()
        (self.root / "manifest.json").write_bytes(raw)
        self.sha256 = hashlib.sha256(raw).hexdigest()


def random_bytes(size: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(size)


class Server:
    """A real ``sftp-server``; each call opens one channel, as the broker does.

    With ``meddle``, what the server sends runs through it: it gets the number of the channel,
    the position in the stream and the bytes, and gives the bytes to pass on, or ``None`` to cut
    the channel.
    """

    def __init__(
        self,
        meddle: Callable[[int, int, bytes], bytes | None] | None = None,
        *,
        writes: bool = False,
    ) -> None:
        self.opened = 0
        self._command = [SFTP_SERVER] if writes else [SFTP_SERVER, "-R"]
        self._meddle = meddle
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def __call__(self) -> socket.socket:
        near, far = socket.socketpair()
        with far:
            process = subprocess.Popen(self._command, stdin=far.fileno(), stdout=far.fileno())
        with self._lock:
            number = self.opened
            self.opened += 1
            self._processes.append(process)
        if self._meddle is None:
            return near
        front, back = socket.socketpair()
        with self._lock:
            self._sockets += [near, back]
        for args in ((back, near, None), (near, back, number)):
            thread = threading.Thread(target=self._pass_on, args=args, daemon=True)
            self._threads.append(thread)
            thread.start()
        return front

    def _pass_on(self, source: socket.socket, sink: socket.socket, number: int | None) -> None:
        assert self._meddle is not None
        at = 0
        try:
            while data := source.recv(65536):
                passed = data if number is None else self._meddle(number, at, data)
                if passed is None:
                    break
                at += len(data)
                sink.sendall(passed)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Kill every server that runs now, as a cut connection does."""
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every server that runs now."""
        with self._lock:
            for process in self._processes:
                process.send_signal(number)

    def finish(self) -> None:
        """Wait until the servers whose clients have gone have done what they were asked."""
        self._processes[0].wait(timeout=10)

    def close(self) -> None:
        self.kill()
        for process in self._processes:
            process.wait(timeout=10)
        for thread in self._threads:
            thread.join(timeout=10)
        for end in self._sockets:
            end.close()


class Gate:
    """The way to a server; shut, so that each attempt is refused, until it is opened."""

    def __init__(self, server: Server) -> None:
        self.refusals = 0
        self.asked = threading.Event()
        self.opened = threading.Event()
        self._server = server

    def __call__(self) -> socket.socket:
        self.asked.set()
        if not self.opened.is_set():
            self.refusals += 1
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        return self._server()


def parts(folder: Path) -> list[str]:
    """Return the names of what is half written below a folder."""
    return [path.name for path in folder.rglob("*") if is_part(path.name)]


def work_server(work: Path) -> list[str]:
    """Return the command of a server on which a folder is /work; needs root."""
    unshare = ["/usr/bin/unshare", "--mount", "--propagation", "private"]
    return [*unshare, sys.executable, "-I", str(CHROOT), str(work)]


class Broker:
    """A unix socket on which each connection becomes one SFTP channel, as in a session."""

    def __init__(self, path: Path, command: Sequence[str] = (SFTP_SERVER, "-R")) -> None:
        self.path = path
        self.connections = 0
        self._command = list(command)
        self._processes: list[subprocess.Popen[bytes]] = []
        # A signal is for every server that was begun before it.
        self._lock = threading.Condition()
        self._silent = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return  # closed
                raise
            with connection, self._lock:
                self._lock.wait_for(lambda: not self._silent)
                self.connections += 1
                self._processes.append(
                    subprocess.Popen(
                        self._command, stdin=connection.fileno(), stdout=connection.fileno()
                    )
                )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every server that runs now; SIGKILL is what a cut connection does."""
        with self._lock:
            for process in self._processes:
                process.send_signal(number)

    @contextlib.contextmanager
    def silence(self) -> Iterator[None]:
        """Have no server answer, nor one that a client asks for meanwhile."""
        with self._lock:
            self._silent = True
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self._answer_again()

    def _answer_again(self) -> None:
        with self._lock:
            self._silent = False
            self._lock.notify_all()
        self.send(signal.SIGCONT)

    def close(self) -> None:
        self._answer_again()
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=10)
        self._listener.close()
        for process in self._processes:
            process.kill()
            process.wait(timeout=10)
