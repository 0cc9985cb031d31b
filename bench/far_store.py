"""A store at the far end of a line, and the ways to read from it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.far_host import CIPHER, LOGIN, SSH_PORT, Connect, FarHost, Node
from kakehashi.link import Reader
from tests.lab.hosts import ENVIRONMENT, run, wait_for
from tests.lab.wan import ADDRESSES
from tests.link.mounted import MountedView

BLOCK = 131072
PACKED = (32, 100 << 20)
SMALL = (4000, 256 << 10)
HEADER_BYTES = 4096
TUNED = (
    f"ro,Ciphers={CIPHER},compression=no,kernel_cache,auto_cache,"
    "dcache_timeout=86400,entry_timeout=86400,attr_timeout=86400"
)
READ_AHEAD_KIB = 16384
BACKGROUND = 256
CONNECTIONS_AT_MOST = 8
TLS_PORT = 443
# The cipher that ssh has here, too.
NGINX = """\
daemon off;
user root;
worker_processes 2;
pid {base}/nginx.pid;
error_log {base}/nginx.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  default_type application/octet-stream;
  keepalive_requests 1000000;
  server {{
    listen {address}:{port} ssl;
    ssl_certificate {base}/tls.crt;
    ssl_certificate_key {base}/tls.key;
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    root {base}/data;
  }}
}}
"""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

Https = http.client.HTTPConnection


@dataclass(frozen=True)
class Cost:
    """CPU seconds so far: of the program that reads, and of ssh and sshd for it."""

    client: float
    ssh: float


@dataclass(frozen=True)
class Load:
    """Something that reads: how far it is, and what it has cost."""

    done: Callable[[], int]
    cost: Callable[[], Cost]


def cpu_of(pid: int, *, children: bool = True) -> float:
    """Return the CPU seconds of a process, with all below it where asked."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = (int(words[11]) + int(words[12])) * TICK_S
    if not children:
        return own
    ended = (int(words[13]) + int(words[14])) * TICK_S
    return own + ended + sum(cpu_of(int(child)) for child in below)


class FarStore(FarHost):
    """A store of packed series at the far end."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__(stack)
        self.packed, self.small, self.sha256 = self._fill(self.base / "data")
        self._mounts = 0
        # The chroot's folders must be root's all the way, which /dev/shm itself is not.
        root = Path(tempfile.mkdtemp(prefix="kakehashi-bench-", dir="/run"))
        stack.callback(root.rmdir)
        run(["mount", "--bind", str(self.base / "data"), str(root)])
        stack.callback(run, ["umount", "--lazy", str(root)])
        self.serve(
            stack,
            files=f"ChrootDirectory {root}\nForceCommand internal-sftp -R",
            plain=f"ChrootDirectory none\nForceCommand /bin/cat {self.base}/data/series/1.*.ozx",
        )

    def _fill(self, root: Path) -> tuple[list[str], list[str], str]:
        # Nothing on the way looks into the bytes, but they must not be compressible or alike.
        source = os.urandom(PACKED[1])
        digests: list[dict[str, object]] = []
        names: dict[str, list[str]] = {"1": [], "2": []}
        (root / "series").mkdir(parents=True)
        root.chmod(0o755)
        for kind, (count, size) in (("1", PACKED), ("2", SMALL)):
            for number in range(count):
                start = number * 4099 % (PACKED[1] - SMALL[1])
                data = (
                    (source[start:] + source[:start])[:size]
                    if size > SMALL[1]
                    else source[start : start + size]
                )
                path = f"series/{kind}.{number}.ozx"
                hashes = b"".join(
                    hashlib.sha256(data[at : at + BLOCK]).digest() for at in range(0, size, BLOCK)
                )
                (root / path).write_bytes(data)
                (root / path).with_suffix(".blocks").write_bytes(hashes)
                names[kind].append(path)
                digests.append(
                    {
                        "path": path,
                        "size": size,
                        "blocks": hashlib.sha256(hashes).hexdigest(),
                        "series": {},
                    }
                )
        raw = json.dumps(
            {
                "kakehashi_manifest": 1,
                "project": "bench",
                "cohort": {"version": 1, "sha256": "0" * 64},
                "block_size": BLOCK,
                "files": digests,
            }
        ).encode()
        (root / "manifest.json").write_bytes(raw)
        return names["1"], names["2"], hashlib.sha256(raw).hexdigest()

    # -- ways to read ---------------------------------------------------------------------

    def cat(self, stack: contextlib.ExitStack, connections: int) -> Load:
        """Let ssh carry files side by side, and count what comes."""
        clients = [
            subprocess.Popen(
                self.plain_command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
            for _ in range(connections)
        ]
        counts = [0] * connections

        def count(number: int) -> None:
            pipe = clients[number].stdout
            assert pipe is not None
            while data := os.read(pipe.fileno(), 1 << 20):
                counts[number] += len(data)

        threads = [threading.Thread(target=count, args=(n,)) for n in range(connections)]
        for thread in threads:
            thread.start()

        def end() -> None:
            for client, thread in zip(clients, threads, strict=True):
                client.kill()
                thread.join()
                client.communicate()

        stack.callback(end)
        pids = [client.pid for client in clients]
        return Load(
            lambda: sum(counts),
            lambda: Cost(time.process_time(), sum(map(cpu_of, pids)) + cpu_of(self.sshd)),
        )

    def channels(
        self, stack: contextlib.ExitStack, node: Node | None = None
    ) -> tuple[Connect, Callable[[], float]]:
        """Return what opens SFTP channels to the store, and their CPU seconds."""
        clients: list[subprocess.Popen[bytes]] = []
        connect = self.opener(stack, clients, node)
        return connect, lambda: sum(cpu_of(client.pid) for client in clients)

    def reader(
        self, stack: contextlib.ExitStack, *, through: Callable[[Connect], Connect] | None = None
    ) -> tuple[Reader, Callable[[], Cost]]:
        """Return the reader, as a session makes it; its channels may lead through something."""
        connect, ssh = self.channels(stack)
        if through is not None:
            connect = through(connect)
        reader = Reader.connect(connect, manifest_path="/manifest.json", sha256=self.sha256)
        stack.enter_context(reader)
        return reader, lambda: Cost(time.process_time(), ssh() + cpu_of(self.sshd))

    def view(self, stack: contextlib.ExitStack) -> tuple[list[Path], Callable[[], Cost]]:
        """Return the view's mount, as a session has it."""
        connect, ssh = self.channels(stack)
        point = self._mount_point()
        view = MountedView(point, connect, "/manifest.json", self.sha256, ())
        stack.callback(view.close)
        view.ready()
        pid = view.process.pid
        return [view.root], lambda: Cost(cpu_of(pid), ssh() + cpu_of(self.sshd))

    def sshfs(
        self, stack: contextlib.ExitStack, *, tuned: bool, workers: int = 1, mounts: int = 1
    ) -> tuple[list[Path], Callable[[], Cost]]:
        """Return sshfs's mounts, as they are or with what is known to help.

        ``workers`` are those of one mount.
        """
        points, processes = zip(
            *(self._sshfs(stack, tuned=tuned, workers=workers) for _ in range(mounts)), strict=True
        )

        def cost() -> Cost:
            own = sum(cpu_of(process.pid, children=False) for process in processes)
            below = sum(cpu_of(process.pid) for process in processes) - own
            return Cost(own, below + cpu_of(self.sshd))

        return list(points), cost

    def _sshfs(
        self, stack: contextlib.ExitStack, *, tuned: bool, workers: int
    ) -> tuple[Path, subprocess.Popen[bytes]]:
        point = self._mount_point()
        options = ",".join(f"{name}={value}" for name, value in self.options().items())
        argv = ["sshfs", f"{LOGIN}:/", str(point), "-f", "-o", options]
        if tuned:
            connections = min(workers, CONNECTIONS_AT_MOST)
            argv += ["-o", TUNED, "-o", f"max_conns={connections}"]
        process = subprocess.Popen(self.site.inside(argv), env=ENVIRONMENT)
        _until_mounted(stack, "sshfs", process, point)
        if tuned:
            number = os.minor(point.stat().st_dev)
            Path(f"/sys/class/bdi/0:{number}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
            with contextlib.suppress(OSError):
                # Only where the control file system is mounted.
                Path(f"/sys/fs/fuse/connections/{number}/max_background").write_text(
                    str(BACKGROUND)
                )

        return point, process

    def rclone(self, stack: contextlib.ExitStack) -> tuple[list[Path], Callable[[], Cost]]:
        """Return rclone's mount, by its own ssh, with what helps it."""
        point = self._mount_point()
        remote = (
            f":sftp,host={ADDRESSES[1]},port={SSH_PORT},user=root,key_file={self.base / 'user'},"
            f"known_hosts_file={self.base / 'known'},shell_type=none,disable_hashcheck=true:/"
        )
        argv = ["rclone", "mount", remote, str(point), "--config", "/dev/null", "--read-only"]
        argv += ["--dir-cache-time", "24h", "--attr-timeout", "24h", "--buffer-size", "64Mi"]
        argv += ["--max-read-ahead", "16Mi", "--sftp-concurrency", "64"]
        with (self.base / "rclone.log").open("ab") as log:
            process = subprocess.Popen(self.site.inside(argv), env=ENVIRONMENT, stderr=log)
        _until_mounted(stack, "rclone", process, point)
        return [point], lambda: Cost(cpu_of(process.pid), cpu_of(self.sshd))

    def nginx(self, stack: contextlib.ExitStack) -> tuple[Callable[[], Https], Callable[[], Cost]]:
        """Return what connects to nginx at the store, over TLS."""
        self._make_certificate()
        (self.base / "nginx.conf").write_text(
            NGINX.format(base=self.base, address=ADDRESSES[1], port=TLS_PORT)
        )
        server = subprocess.Popen(
            self.store.inside(["nginx", "-c", f"{self.base}/nginx.conf"]), env=ENVIRONMENT
        )
        trusted = ssl.create_default_context(cafile=self.base / "tls.crt")
        opened: list[Https] = []

        def connect() -> Https:
            connection = Https(ADDRESSES[1], TLS_PORT)
            plain = self.site.socket()
            plain.connect((ADDRESSES[1], TLS_PORT))
            connection.sock = trusted.wrap_socket(plain, server_hostname=ADDRESSES[1])
            opened.append(connection)
            return connection

        def end() -> None:
            for connection in opened:
                connection.close()
            server.terminate()
            server.wait()

        def answers() -> bool:
            with self.site.socket() as probe:
                return probe.connect_ex((ADDRESSES[1], TLS_PORT)) == 0

        stack.callback(end)
        wait_for("nginx", answers)
        return connect, lambda: Cost(time.process_time(), cpu_of(server.pid))

    def _make_certificate(self) -> None:
        if not (self.base / "tls.crt").exists():
            run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                 "-nodes", "-days", "2", "-subj", "/CN=store", "-addext",
                 f"subjectAltName=IP:{ADDRESSES[1]}", "-keyout", f"{self.base}/tls.key",
                 "-out", f"{self.base}/tls.crt"])  # fmt: skip

    def _mount_point(self) -> Path:
        self._mounts += 1
        point = self.base / f"mount{self._mounts}"
        point.mkdir()
        return point


def _until_mounted(
    stack: contextlib.ExitStack, name: str, process: subprocess.Popen[bytes], point: Path
) -> None:
    """Wait for a process's mount; both end with the stack, also if it does not come."""

    def end() -> None:
        if os.path.ismount(point):
            run(["umount", "--lazy", str(point)])
        process.terminate()
        process.wait()

    stack.callback(end)
    wait_for(name, lambda: os.path.ismount(point))


@contextlib.contextmanager
def at_work(
    files: Sequence[str], workers: int, read: Callable[[str, Callable[[int], None]], None]
) -> Iterator[Callable[[], int]]:
    """Let workers read the files, each its share, over and over; gives what they have done."""
    counts = [0] * workers
    stopped = threading.Event()
    failures: list[BaseException] = []

    class _Stopped(Exception):  # noqa: N818 - it is no error
        pass

    def work(number: int) -> None:
        def tell(done: int) -> None:
            counts[number] += done
            if stopped.is_set():
                raise _Stopped

        try:
            while True:
                for path in files[number::workers]:
                    read(path, tell)
        except _Stopped:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()

    def done() -> int:
        if failures:
            raise failures[0]
        return sum(counts)

    try:
        yield done
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
