"""Two hosts with a line between them, and sshd and iperf3 at its far end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.lab.hosts import ENVIRONMENT, run, wait_for
from tests.lab.wan import ADDRESSES, Network, Wan

IPERF_PORT, SSH_PORT = 5201, 22
# On this one a connection carries bytes and nothing else: what ssh itself can do.
PLAIN_PORT = 2222
CONNECTIONS = 4
# The first of the product's own list.
CIPHER = "aes128-gcm@openssh.com"
Connect = Callable[[], socket.socket]

LOGIN = f"root@{ADDRESSES[1]}"


@dataclass(frozen=True)
class Node:
    """A host of the site, its line, and what the store is called at the other end of it."""

    network: Network
    wan: Wan
    store: str


class FarHost:
    """The store's host, the site's host, and the line between them.

    Parameters
    ----------
    stack : ExitStack
        Ends all of it.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        # Ended from outside too, it leaves no mount and no process behind.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
        self.base = Path(tempfile.mkdtemp(prefix="kakehashi-bench-", dir="/dev/shm"))
        stack.callback(shutil.rmtree, self.base)
        self.site = stack.enter_context(Network())
        self.store = stack.enter_context(Network())
        self.wan = stack.enter_context(Wan(self.site.path, self.store.path))
        for name in ("host", "user"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.base / name)])
        host_key = (self.base / "host.pub").read_text()
        (self.base / "known").write_text(f"* {host_key}")
        server = subprocess.Popen(
            self.store.inside(["iperf3", "-s", "-p", str(IPERF_PORT)]),
            stdout=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        stack.callback(server.wait)
        stack.callback(server.terminate)

    # -- sshd at the far end ----------------------------------------------------------------

    def serve(self, stack: contextlib.ExitStack, files: str, plain: str) -> None:
        """Start sshd, for root with the one key.

        Parameters
        ----------
        stack : ExitStack
            Ends it.
        files, plain : str
            Lines of its configuration for either port.
        """
        (self.base / "sshd_config").write_text(
            f"Port {SSH_PORT}\nPort {PLAIN_PORT}\n"
            f"HostKey {self.base / 'host'}\nAuthorizedKeysFile {self.base / 'user.pub'}\n"
            "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin prohibit-password\n"
            f"MaxStartups 100\nSubsystem sftp internal-sftp\n{files}\n"
            f"Match LocalPort {PLAIN_PORT}\n{plain}\n"
        )
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self._server = self._start_sshd()
        stack.callback(self._stop_sshd)

    @property
    def sshd(self) -> int:
        """Number of its process."""
        return self._server.pid

    def restart_sshd(self) -> None:
        """Kill sshd with all that it serves, and start it again."""
        self._stop_sshd()
        self._server = self._start_sshd()

    def _start_sshd(self) -> subprocess.Popen[bytes]:
        with (self.base / "sshd.log").open("ab") as log:
            sshd = subprocess.Popen(
                self.store.inside(["/usr/sbin/sshd", "-D", "-e", "-f", f"{self.base}/sshd_config"]),
                stderr=log,
                env=ENVIRONMENT,
            )

        def answers() -> bool:
            with self.site.socket() as probe:
                return probe.connect_ex((ADDRESSES[1], SSH_PORT)) == 0

        wait_for("the store's sshd", answers)
        return sshd

    def _stop_sshd(self) -> None:
        below = Path(f"/proc/{self.sshd}/task/{self.sshd}/children").read_text().split()
        self._server.kill()
        self._server.wait()
        for pid in map(int, below):
            # It may have ended by itself.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- its clients ------------------------------------------------------------------------

    def options(self) -> dict[str, str]:
        """Return ssh's settings, but for the cipher."""
        return {
            "BatchMode": "yes",
            "Compression": "no",
            "ConnectTimeout": "15",
            "GlobalKnownHostsFile": "/dev/null",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "IdentityFile": str(self.base / "user"),
            "LogLevel": "ERROR",
            "ServerAliveCountMax": "6",
            "ServerAliveInterval": "20",
            "UserKnownHostsFile": str(self.base / "known"),
        }

    def further_node(self, stack: contextlib.ExitStack, number: int) -> Node:
        """Return another host of the site, with a line of its own to the store."""
        addresses = (f"10.199.{number}.1", f"10.199.{number}.2")
        network = stack.enter_context(Network())
        wan = stack.enter_context(Wan(network.path, self.store.path, addresses=addresses))
        return Node(network, wan, addresses[1])

    @property
    def node(self) -> Node:
        """The host that is always there."""
        return Node(self.site, self.wan, ADDRESSES[1])

    def client(self, program: str, *words: str, node: Node | None = None) -> list[str]:
        """Return the argument list of ``ssh`` or ``sftp`` at the site."""
        options = self.options() | {"Ciphers": CIPHER}
        settings = [f"-o{name}={value}" for name, value in options.items()]
        here = (node or self.node).network
        return here.inside([program, "-F", "none", *settings, *words])

    def channel_command(self, node: Node | None = None) -> list[str]:
        """Return the argument list of one SFTP channel."""
        login = f"root@{(node or self.node).store}"
        return self.client("ssh", "-T", "-p", str(SSH_PORT), "-s", login, "sftp", node=node)

    def plain_command(self) -> list[str]:
        """Return the argument list of a connection that carries bytes and nothing else."""
        return self.client("ssh", "-T", "-p", str(PLAIN_PORT), LOGIN)

    def opener(
        self,
        stack: contextlib.ExitStack,
        clients: list[subprocess.Popen[bytes]],
        node: Node | None = None,
    ) -> Connect:
        """Return what opens SFTP channels, each a process that is added to ``clients``."""
        argv = self.channel_command(node)

        def connect() -> socket.socket:
            near, far = socket.socketpair()
            with far:
                clients.append(subprocess.Popen(argv, stdin=far.fileno(), stdout=far.fileno()))
            return near

        def end() -> None:
            for client in clients:
                client.kill()
                client.wait()

        stack.callback(end)
        return connect

    def iperf(self, seconds: int, *, from_store: bool) -> float:
        """Return what plain TCP carries over a few connections, in MB/s."""
        argv = ["iperf3", "-c", ADDRESSES[1], "-p", str(IPERF_PORT), "-P", str(CONNECTIONS)]
        argv += ["-O", "1", "-t", str(seconds), "-J", *(["-R"] if from_store else [])]
        found: dict[str, dict[str, dict[str, float]]] = {}

        def measured() -> bool:
            # The server takes the next client a moment after it let go of the last.
            done = subprocess.run(
                self.site.inside(argv), capture_output=True, check=False, env=ENVIRONMENT
            )
            found.update(json.loads(done.stdout))
            return done.returncode == 0

        wait_for("iperf3", measured, 60)
        return found["end"]["sum_received"]["bits_per_second"] / 8e6
