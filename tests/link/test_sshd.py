"""Through a real sshd: chroot, read-only SFTP, a key, connections that are cut."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kakehashi.link import Reader
from kakehashi.link.work import WorkNotFoundError, is_part
from kakehashi.link.workchannel import ChannelFolder
from tests.link.stores import BLOCK, StoreFolder, random_bytes

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="sshd's chroot needs root"),
    pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="no sshd on this machine"),
]


class Sshd:
    """One sshd on a free port; each call opens one SFTP channel through ``ssh``."""

    def __init__(self, base: Path, chroot: Path, options: str = "-R") -> None:
        self.base = base
        self._clients: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(base / name)], check=True
            )
        (base / "authorized").write_bytes((base / "user.pub").read_bytes())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        host_key = (base / "host.pub").read_text(encoding="ascii")
        (base / "known").write_text(f"[127.0.0.1]:{self.port} {host_key}", encoding="ascii")
        config = base / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {base / 'host'}\n"
            f"AuthorizedKeysFile {base / 'authorized'}\nStrictModes no\nUsePAM no\n"
            f"PidFile none\nPermitRootLogin prohibit-password\nChrootDirectory {chroot}\n"
            f"Subsystem sftp internal-sftp\nForceCommand internal-sftp {options}\n",
            encoding="ascii",
        )
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self._log = (base / "log").open("wb")
        self._sshd = subprocess.Popen(
            ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)],
            stderr=self._log,
            start_new_session=True,
        )
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                break
            except ConnectionRefusedError:
                assert self._sshd.poll() is None, (base / "log").read_text(encoding="utf-8")
                assert time.monotonic() < end

    def __call__(self) -> socket.socket:
        near, far = socket.socketpair()
        with far:
            client = subprocess.Popen(
                [
                    *("ssh", "-F", "none", "-T", "-p", str(self.port), "-i", self.base / "user"),
                    *("-o", f"UserKnownHostsFile={self.base / 'known'}"),
                    *("-o", "GlobalKnownHostsFile=/dev/null", "-o", "BatchMode=yes"),
                    *("-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none"),
                    *("-o", "Ciphers=aes128-gcm@openssh.com", "-o", "LogLevel=ERROR"),
                    *("-s", "root@127.0.0.1", "sftp"),
                ],
                stdin=far.fileno(),
                stdout=far.fileno(),
                stderr=subprocess.DEVNULL,
            )
        with self._lock:
            self._clients.append(client)
        return near

    def cut(self) -> None:
        """End every connection at the store's side, the listener stays up."""
        # sshd's children: one per connection, each of them with the session below it.
        mine = Path(f"/proc/{self._sshd.pid}/task/{self._sshd.pid}/children")
        for child in mine.read_text(encoding="ascii").split():
            try:
                os.kill(int(child), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        self.cut()
        self._sshd.terminate()
        self._sshd.wait(timeout=10)
        for client in self._clients:
            client.kill()
            client.wait(timeout=10)
        self._log.close()


@pytest.fixture
def sshd(tmp_path: Path, public_folder: Path) -> Iterator[Sshd]:
    sshd = Sshd(tmp_path, public_folder)
    yield sshd
    sshd.close()


def test_the_grants_paths_are_those_inside_the_chroot(sshd: Sshd, public_folder: Path) -> None:
    folder = StoreFolder(public_folder)
    data = random_bytes(30 * BLOCK + 11)
    path = folder.add("1.2.3", data)
    with Reader.connect(sshd, manifest_path="/manifest.json", sha256=folder.sha256) as reader:
        assert reader.open(path).read(0, len(data)) == data


def test_connections_that_the_store_cuts_show_as_nothing(sshd: Sshd, public_folder: Path) -> None:
    folder = StoreFolder(public_folder)
    data = random_bytes(300 * BLOCK)
    path = folder.add("1.2.3", data)
    with (
        Reader.connect(sshd, manifest_path="/manifest.json", sha256=folder.sha256) as reader,
        reader.open(path) as file,
    ):
        got = b""
        for at in range(0, len(data), 30 * BLOCK):
            got += file.read(at, 30 * BLOCK)
            if at in (60 * BLOCK, 150 * BLOCK):
                sshd.cut()
        assert got == data
        assert reader.stats().reconnects >= 2


@pytest.fixture
def writable(tmp_path: Path, public_folder: Path) -> Iterator[Sshd]:
    (public_folder / "work").mkdir(mode=0o700)
    sshd = Sshd(tmp_path, public_folder, "-u 0007")
    yield sshd
    sshd.close()


def test_the_work_folder_is_written_through_cuts(writable: Sshd, public_folder: Path) -> None:
    data = random_bytes(20 << 20)
    with ChannelFolder(writable) as work:
        work.mkdir("hanako")
        with work.begin("hanako/a.bin") as incoming:
            for at in range(0, len(data), 5 << 20):
                incoming.write(data[at : at + (5 << 20)])
                writable.cut()
            incoming.commit()
        assert (public_folder / "work/hanako/a.bin").read_bytes() == data
        writable.cut()
        assert work.read("hanako/a.bin") == data
        (public_folder / "work/out").symlink_to("/etc/passwd")
        with pytest.raises(WorkNotFoundError):
            work.read("out")
        assert not [path for path in public_folder.rglob("*") if is_part(path.name)]
        # As the store sets it up: what the work account makes is nobody else's.
        assert (public_folder / "work/hanako/a.bin").stat().st_mode & 0o7 == 0
