"""A line between two hosts of one machine, as long, slow and unreliable as a test wants it.

The line itself is a small C program (``wan.c``), compiled at first use; it needs no kernel module
but ``tun``. It lives no longer than its :class:`Wan`.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.lab.hosts import ENVIRONMENT, LabError, run

if TYPE_CHECKING:
    from types import TracebackType

SOURCE = Path(__file__).with_suffix(".c")
PROGRAM = Path(__file__).resolve().parents[2] / "build" / "lab" / "wan"
COMPILER = ("cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")

ADDRESSES = ("10.199.0.1", "10.199.0.2")
"""What the two ends are called, unless they are to have other addresses."""

QUEUE_AT_LEAST = 256 << 10
"""Bytes of queue of a line so short that one bandwidth-delay product is next to nothing."""

# A sender is held back by what lies in its device; a longer queue there is never full.
_DEVICE_PACKETS = 10_000
_PATIENCE_S = 20.0
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


@dataclass(frozen=True)
class Line:
    """What a line does to packets, the same in both directions.

    Attributes
    ----------
    delay_ms : float
        On the way one way; the round trip is twice that.
    jitter_ms : float
        Up to so much more for each packet, evenly. The order is kept, so a packet also waits
        for those before it.
    reorder : bool
        Jitter may let packets overtake.
    rate_mbit : float or None
        Million bits a second; no limit where it is None.
    queue_bytes : int or None
        What may wait to be sent at a limited rate, the rest is dropped; one bandwidth-delay
        product where it is None, at least `QUEUE_AT_LEAST`.
    loss : float
        Share of packets that are lost, each by itself.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    reorder: bool = False
    rate_mbit: float | None = None
    queue_bytes: int | None = None
    loss: float = 0.0

    def __post_init__(self) -> None:
        if min(self.delay_ms, self.jitter_ms) < 0:
            raise ValueError(f"delay and jitter must not be negative: {self}")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"loss is a share, 0 to 1: {self.loss}")
        if self.rate_mbit is not None and self.rate_mbit <= 0:
            raise ValueError(f"a rate must be above 0, or None: {self.rate_mbit}")

    @property
    def queue(self) -> int:
        if self.queue_bytes is not None:
            return self.queue_bytes
        product = (self.rate_mbit or 0) * 1e6 / 8 * 2 * self.delay_ms / 1e3
        return max(QUEUE_AT_LEAST, int(product))

    @property
    def words(self) -> str:
        """Say it in the program's words."""
        return (
            f"delay_ns {self.delay_ms * 1e6:.0f} jitter_ns {self.jitter_ms * 1e6:.0f} "
            f"reorder {self.reorder:d} rate_bps {(self.rate_mbit or 0) * 1e6:.0f} "
            f"queue_bytes {self.queue} loss {self.loss:.9f}"
        )


@dataclass(frozen=True)
class Direction:
    """Counts of one direction, in packets as they are on the line.

    Attributes
    ----------
    packets, bytes : int
        What arrived at the other end; the bytes are those of IP packets.
    lost, tail_dropped, cut_dropped, reset_dropped : int
        What did not, by the loss, at a full queue, in a cut, and of flows that were reset.
    device_dropped, memory_dropped, refused : int
        What the sender's device or the program had no room for, and what the other end's kernel
        did not take. Not 0 is a line that was asked too much of.
    queue_bytes, queue_peak_bytes : int
        What waits to be sent, and the most that did.
    held_packets, held_bytes, held_peak_bytes : int
        What is under way in memory; 64 KiB of one flow are one packet here.
    late_max_ms : float
        The latest that a packet left after it was due.
    """

    packets: int
    bytes: int
    lost: int
    tail_dropped: int
    cut_dropped: int
    reset_dropped: int
    memory_dropped: int
    refused: int
    device_dropped: int
    queue_bytes: int
    queue_peak_bytes: int
    held_packets: int
    held_bytes: int
    held_peak_bytes: int
    late_max_ms: float


@dataclass(frozen=True)
class Figures:
    """What a line did so far; ``directions`` are from the one end and from the other."""

    directions: tuple[Direction, Direction]
    resets_sent: int
    cpu_seconds: float


class Network:
    """A network namespace without a host around it."""

    def __init__(self) -> None:
        # `cat` ends when the pipe does, so nothing of it outlives this process.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self._holder.kill()
            raise LabError("no network namespace could be made; is this root?")
        self.pid = self._holder.pid
        self.path = namespace_of(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.communicate()

    def inside(self, argv: Sequence[str]) -> list[str]:
        """Return the argument list that runs a command in this namespace."""
        return ["nsenter", f"--net={self.path}", *argv]

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """Return a socket of this namespace, for use in this process."""
        made: list[socket.socket | OSError] = []

        def make() -> None:
            # A namespace is a thread's own, and a socket stays in the one it was made in.
            libc = ctypes.CDLL(None, use_errno=True)
            with self.path.open("rb") as file:
                if libc.setns(file.fileno(), _CLONE_NEWNET):
                    made.append(OSError(ctypes.get_errno(), "setns"))
                    return
            made.append(socket.socket(socket.AF_INET, kind))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]


def namespace_of(pid: int) -> Path:
    """Return the network namespace of a process, as :class:`Wan` wants it."""
    return Path(f"/proc/{pid}/ns/net")


def program() -> Path:
    """Return the line's program, compiled where the source is newer."""
    if PROGRAM.exists() and PROGRAM.stat().st_mtime >= SOURCE.stat().st_mtime:
        return PROGRAM
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process's number, which is the same in several namespaces at once.
    with tempfile.TemporaryDirectory(dir=PROGRAM.parent) as folder:
        part = Path(folder, PROGRAM.name)
        run([*COMPILER, "-o", str(part), str(SOURCE)])
        part.replace(PROGRAM)
    return PROGRAM


class Wan:
    """A line between two network namespaces, there for as long as the ``with`` block.

    Parameters
    ----------
    one, other : Path
        The namespaces' files (`namespace_of`).
    addresses : pair of str
        What each end is called. Addresses that the two hosts already have elsewhere are fine:
        what they say to each other then takes this line.
    **settings
        As :class:`Line`.

    Examples
    --------
    >>> with Network() as site, Network() as store:
    ...     with Wan(site.path, store.path, delay_ms=5, rate_mbit=2000) as wan:
    ...         wan.cut()
    """

    def __init__(
        self,
        one: Path,
        other: Path,
        *,
        addresses: tuple[str, str] = ADDRESSES,
        **settings: Any,
    ) -> None:
        self.addresses = addresses
        self.line = Line(**settings)
        self._namespaces = (one, other)
        self._device = f"wan{os.getpid() % 100_000}-{next(_numbers)}"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_PATIENCE_S)
        with far:
            self._process = subprocess.Popen(
                [
                    str(program()),
                    str(far.fileno()),
                    *map(str, self._namespaces),
                    self._device,
                ],
                pass_fds=[far.fileno()],
                env=ENVIRONMENT,
            )
        try:
            self._expect_ready()
            for here, at, there in zip(
                self._namespaces, self.addresses, reversed(self.addresses), strict=True
            ):
                self._join(here, at, there)
            self._apply()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away, with its devices, addresses and routes."""
        self._control.close()
        if self._process is not None:
            self._process.wait(timeout=_PATIENCE_S)

    def set(self, **changes: Any) -> None:
        """Change settings while the line is in use, named as in :class:`Line`.

        What is under way already arrives as if nothing had been changed.
        """
        self.line = replace(self.line, **changes)
        self._apply()

    def cut(self) -> None:
        """Let everything vanish, also what is under way, until it is healed."""
        self._ask("set cut 1")

    def heal(self) -> None:
        """End a cut."""
        self._ask("set cut 0")

    def reset(self, port: int | None = None) -> int:
        """End the TCP flows (over IPv4) that the line knows, at both ends; return how many.

        Each end gets a reset as if from the other at once, and an answer to whatever it still
        sends. In a cut the ends learn of it when they next send something after it.

        Parameters
        ----------
        port : int, optional
            Only flows with this port at either end.
        """
        if port is not None and not 0 < port < 65536:
            raise ValueError(f"a port is 1 to 65535: {port}")
        return int(self._ask(f"reset {port or 0}"))

    def figures(self) -> Figures:
        """Return what the line did so far."""
        document = json.loads(self._ask("figures"))
        forth, back = (
            Direction(device_dropped=self._device_dropped(namespace), **item)
            for namespace, item in zip(self._namespaces, document["directions"], strict=True)
        )
        return Figures((forth, back), document["resets_sent"], document["cpu_seconds"])

    @property
    def overrun(self) -> int:
        """Packets that were dropped only because the line's program could not keep up."""
        return sum(
            item.device_dropped + item.memory_dropped + item.refused
            for item in self.figures().directions
        )

    def _device_dropped(self, namespace: Path) -> int:
        inside = ["nsenter", f"--net={namespace}"]
        shown = run([*inside, "ip", "-json", "-stats", "link", "show", "dev", self._device])
        return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["dropped"])

    def _expect_ready(self) -> None:
        if self._control.recv(64) != b"ready":
            raise LabError("the line's program ended at once; its message is above")

    def _apply(self) -> None:
        self._ask(f"set {self.line.words}")

    def _ask(self, request: str) -> str:
        with self._lock:
            self._control.sendall(request.encode())
            answer = self._control.recv(8192).decode()
        if not answer or answer.startswith("error"):
            raise LabError(f"the line, asked to {request!r}: {answer or 'it has ended'}")
        return answer

    def _join(self, namespace: Path, address: str, peer: str) -> None:
        inside = ["nsenter", f"--net={namespace}", "ip"]
        device = ["dev", self._device]
        # IPv6 would talk of its own accord, and what the line carries is counted.
        run([*inside, "link", "set", *device, "addrgenmode", "none"])
        run([*inside, "link", "set", *device, "txqueuelen", str(_DEVICE_PACKETS), "up"])
        run([*inside, "addr", "add", address, "peer", peer, *device])
