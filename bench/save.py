"""Writing over distance: plain TCP, ssh itself, ``sftp``'s put and the work folder, side by side.

Each writes the same bytes into memory at the store, in turn with all others. The work folder's
time is to the end: read back, compared, flushed and in its place.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.figures import Goal, Series, arguments, at_least, interleaved, report
from kakehashi.link.workchannel import ChannelFolder
from tests.lab.hosts import ENVIRONMENT, need_root, run, wait_for
from tests.lab.wan import ADDRESSES, Network, Wan

ROUNDS = 3
SIZE = 400 << 20
RTTS_MS = (0, 10, 20)
RATE_MBIT = 2000
IPERF_PORT, SSH_PORT, SINK_PORT = 5201, 22, 2222
CONNECTIONS = 4
CIPHER = "aes128-gcm@openssh.com"


class FarFolder:
    """A writable folder at the far end of a line."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="kakehashi-bench-", dir="/dev/shm"))
        stack.callback(shutil.rmtree, self.base)
        self.site = stack.enter_context(Network())
        self.store = stack.enter_context(Network())
        self.wan = stack.enter_context(Wan(self.site.path, self.store.path, rate_mbit=RATE_MBIT))
        (self.base / "work").mkdir()
        self.data = os.urandom(SIZE)
        (self.base / "source").write_bytes(self.data)
        for name in ("host", "user"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.base / name)])
        host_key = (self.base / "host.pub").read_text()
        (self.base / "known").write_text(f"{ADDRESSES[1]} {host_key}")
        (self.base / "sshd_config").write_text(
            f"Port {SSH_PORT}\nPort {SINK_PORT}\nListenAddress {ADDRESSES[1]}\n"
            f"HostKey {self.base / 'host'}\nAuthorizedKeysFile {self.base / 'user.pub'}\n"
            "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin prohibit-password\n"
            "MaxStartups 100\nSubsystem sftp internal-sftp\nForceCommand internal-sftp\n"
            # What ssh itself can do: the same bytes, and nothing is done with them.
            f"Match LocalPort {SINK_PORT}\nForceCommand cat > /dev/null\n"
        )
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for argv in (
            ["/usr/sbin/sshd", "-D", "-f", str(self.base / "sshd_config")],
            ["iperf3", "-s", "-p", str(IPERF_PORT)],
        ):
            server = subprocess.Popen(
                self.store.inside(argv), stdout=subprocess.DEVNULL, env=ENVIRONMENT
            )
            stack.callback(server.wait)
            stack.callback(server.terminate)
        wait_for("the store's sshd", self._answers)
        self._clients: list[subprocess.Popen[bytes]] = []
        stack.callback(self._end)
        self.work = stack.enter_context(ChannelFolder(self._connect, root=str(self.base / "work")))

    def _answers(self) -> bool:
        with self.site.socket() as probe:
            return probe.connect_ex((ADDRESSES[1], SSH_PORT)) == 0

    def _options(self) -> list[str]:
        options = {
            "BatchMode": "yes",
            "Ciphers": CIPHER,
            "Compression": "no",
            "GlobalKnownHostsFile": "/dev/null",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "IdentityFile": str(self.base / "user"),
            "LogLevel": "ERROR",
            "UserKnownHostsFile": str(self.base / "known"),
        }
        return ["-F", "none", *(f"-o{name}={value}" for name, value in options.items())]

    def _connect(self) -> socket.socket:
        argv = ["ssh", *self._options(), "-T", "-s", f"root@{ADDRESSES[1]}", "sftp"]
        near, far = socket.socketpair()
        with far:
            self._clients.append(
                subprocess.Popen(self.site.inside(argv), stdin=far.fileno(), stdout=far.fileno())
            )
        return near

    def _end(self) -> None:
        for client in self._clients:
            client.kill()
            client.wait()

    def iperf(self) -> float:
        """Return what plain TCP carries from the site to the store, in MB/s."""
        argv = ["iperf3", "-c", ADDRESSES[1], "-p", str(IPERF_PORT), "-P", str(CONNECTIONS)]
        found: dict[str, dict[str, dict[str, float]]] = {}

        def measured() -> bool:
            # The server takes the next client a moment after it let go of the last.
            done = subprocess.run(
                self.site.inside([*argv, "-O", "1", "-t", "2", "-J"]),
                capture_output=True,
                check=False,
                env=ENVIRONMENT,
            )
            found.update(json.loads(done.stdout))
            return done.returncode == 0

        wait_for("iperf3", measured, 60)
        return found["end"]["sum_received"]["bits_per_second"] / 8e6

    def sink(self) -> None:
        """Let ssh carry the bytes over several connections, to nowhere."""
        argv = ["ssh", *self._options(), "-T", "-p", str(SINK_PORT), f"root@{ADDRESSES[1]}"]
        share = SIZE // CONNECTIONS
        clients = []
        for number in range(CONNECTIONS):
            feed = ["tail", "-c", f"+{number * share + 1}", str(self.base / "source")]
            tail = subprocess.Popen(feed, stdout=subprocess.PIPE)
            head = subprocess.Popen(
                ["head", "-c", str(share)], stdin=tail.stdout, stdout=subprocess.PIPE
            )
            client = subprocess.Popen(self.site.inside(argv), stdin=head.stdout)
            for pipe in (tail.stdout, head.stdout):
                assert pipe is not None
                pipe.close()
            clients += [tail, head, client]
        for client in clients:
            client.wait()

    def put(self) -> None:
        """Let ``sftp`` put the file."""
        subprocess.run(
            self.site.inside(["sftp", "-q", *self._options(), "-b", "-", f"root@{ADDRESSES[1]}"]),
            input=f"put {self.base}/source {self.base}/work/put\n".encode(),
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def save(self) -> None:
        """Write the file into the work folder."""
        self.work.write("saved", self.data)


WAYS: dict[str, Callable[[FarFolder], None]] = {
    "ssh itself, 4 connections": FarFolder.sink,
    "sftp put": FarFolder.put,
    "work folder": FarFolder.save,
}
IPERF = "iperf3, 4 connections"


def main() -> None:
    """Measure and report."""
    need_root()
    options = arguments("writing over distance")
    rtts, rounds = ((10,), 1) if options.quick else (RTTS_MS, ROUNDS)
    with contextlib.ExitStack() as stack:
        far = FarFolder(stack)

        def line(rtt_ms: int) -> float:
            far.wan.set(delay_ms=rtt_ms / 2)
            return far.iperf()

        def rate(rtt_ms: int, way: Callable[[FarFolder], None]) -> float:
            far.wan.set(delay_ms=rtt_ms / 2)
            started = time.monotonic()
            way(far)
            return SIZE / 1e6 / (time.monotonic() - started)

        ways: dict[str, Callable[[], float]] = {}
        for rtt in rtts:
            ways[f"{rtt} ms: {IPERF}"] = functools.partial(line, rtt)
            for name, way in WAYS.items():
                ways[f"{rtt} ms: {name}"] = functools.partial(rate, rtt, way)
        values = interleaved(ways, rounds, Console(stderr=True))
        if (far.base / "work/saved").read_bytes() != far.data:
            raise SystemExit("what was saved is not what was written")

    def share(rtt: int, other: str) -> tuple[float, ...]:
        pairs = zip(values[f"{rtt} ms: work folder"], values[f"{rtt} ms: {other}"], strict=True)
        return tuple(one / two for one, two in pairs)

    goals: list[Goal] = []
    for rtt in rtts:
        goals.append(at_least(f"{rtt} ms: work folder of iperf3", share(rtt, IPERF), 0.8))
        goals.append(at_least(f"{rtt} ms: work folder of sftp put", share(rtt, "sftp put"), 1))
    report(
        f"Writing over distance at {RATE_MBIT / 1000:g} Gbit/s",
        [Series(name, "MB/s", found) for name, found in values.items()],
        goals,
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
