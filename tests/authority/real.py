"""A real store on loopback: real accounts, real sshd, authority and guard."""

from __future__ import annotations

import base64
import contextlib
import grp
import http.client
import json
import pwd
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import SSHCertificateBuilder, SSHCertificateType

from kakehashi import __version__
from kakehashi.audit import Audit, Record
from kakehashi.config import load
from kakehashi.store.authority import hubs, sshd
from kakehashi.store.authority.accounts import acting_as
from kakehashi.store.authority.ca import public_line, write_key
from kakehashi.store.authority.layout import Layout, names
from kakehashi.store.authority.processes import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
SERVE = (
    "import sys, pathlib; from kakehashi.store.authority.supervisor import serve;"
    "serve(pathlib.Path(sys.argv[1]))"
)
SFTP_INIT = struct.pack(">IBI", 5, 1, 3)


def until(ask: Callable[[], T], *, seconds: float = 60, what: str = "it") -> T:
    """Wait until ``ask`` gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while True:
        answer = ask()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come to be within {seconds} s")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Answer:
    """What the authority answered."""

    status: int
    body: dict[str, Any]

    def ok(self) -> dict[str, Any]:
        assert self.status == 200, self.body
        return self.body

    def refused(self, status: int, code: str) -> None:
        assert (self.status, self.body.get("error")) == (status, code), self.body
        assert self.body["message"]


class Hub:
    """A hub, as the authority sees one."""

    def __init__(self, port: int, token: str) -> None:
        self.port = port
        self.token = token

    def call(self, method: str, path: str, body: object = None) -> Answer:
        return self.send(method, path, None if body is None else json.dumps(body).encode())

    def send(self, method: str, path: str, data: bytes | None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        try:
            headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return Answer(response.status, json.loads(response.read() or b"{}"))
        finally:
            connection.close()

    def create(self, **changes: object) -> Answer:
        body: dict[str, object] = {
            "person": "alice",
            "groups": ["g-lung"],
            "project": "lung",
            "site": "here",
            "kind": "interactive",
            "hours": 1,
            "software": __version__,
        }
        return self.call("POST", "/v1/sessions", {**body, **changes})

    def grant(self, created: dict[str, Any], node: Node, **changes: object) -> Answer:
        body: dict[str, object] = {
            "session": created["session"],
            "ticket": created["ticket"],
            "public_key": node.public,
            "host": "node1",
            "address": "127.0.0.1",
            "job": "7",
            "walls": "namespaces",
            "software": __version__,
        }
        return self.call("POST", "/v1/grants", {**body, **changes})

    def renew(
        self, session: str, node: Node, counter: int, *, signer: Node | None = None
    ) -> Answer:
        message = json.dumps({"renew": session, "counter": counter})
        signature = (signer or node).sign(message)
        body = {"session": session, "message": message, "signature": signature}
        return self.call("POST", "/v1/leases", body)

    def end(self, session: str, reason: str = "stopped by the person") -> Answer:
        body = {"reason": reason, "scheduler": {"state": "ended"}}
        return self.call("POST", f"/v1/sessions/{session}/end", body)

    def revoke(self, session: str) -> Answer:
        body = {"by": "admin", "reason": "left the project"}
        return self.call("POST", f"/v1/sessions/{session}/revoke", body)


class Node:
    """A node's wrapper: it has a key, and connects with a certificate for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / secrets.token_hex(4)
        self.folder.mkdir(mode=0o700)
        self.key = Ed25519PrivateKey.generate()
        write_key(self.folder / "key", self.key)
        self.public = public_line(self.key.public_key())
        self.grant: dict[str, Any] = {}

    def sign(self, message: str) -> str:
        return base64.b64encode(self.key.sign(message.encode())).decode()

    def take(self, grant: dict[str, Any]) -> dict[str, Any]:
        """Use a grant's certificate from now on."""
        self.grant = grant
        store = grant["store"]
        (self.folder / "key-cert.pub").write_text(grant["certificate"] + "\n")
        place = f"[{store['address']}]:{store['port']}"
        lines = [f"@cert-authority {place} {line}\n" for line in store["host_ca"].splitlines()]
        (self.folder / "known_hosts").write_text("".join(lines))
        return grant

    def arguments(self, *options: str) -> list[str]:
        wanted = {
            "IdentityFile": self.folder / "key",
            "CertificateFile": self.folder / "key-cert.pub",
            "UserKnownHostsFile": self.folder / "known_hosts",
            "GlobalKnownHostsFile": "/dev/null",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": "10",
        }
        arguments = ["-F", "/dev/null", *options]
        for name, value in wanted.items():
            arguments += ["-o", f"{name}={value}"]
        return arguments

    def ssh(
        self, account: str, *options: str, command: tuple[str, ...] = (), data: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        store = self.grant["store"]
        place = [*self.arguments(*options), "-p", str(store["port"]), f"{account}@127.0.0.1"]
        return subprocess.run(
            ["ssh", *place, *command], input=data, capture_output=True, timeout=20, check=False
        )

    def sftp(self, account: str, *commands: str) -> subprocess.CompletedProcess[str]:
        store = self.grant["store"]
        place = [*self.arguments(), "-P", str(store["port"]), "-b", "-", f"{account}@127.0.0.1"]
        text = "".join(f"{command}\n" for command in commands)
        return subprocess.run(
            ["sftp", *place], input=text, capture_output=True, text=True, timeout=20, check=False
        )

    def admitted(self, account: str) -> bool:
        return self.sftp(account, "pwd").returncode == 0

    @contextlib.contextmanager
    def connected(self, account: str) -> Iterator[Link]:
        """Hold an SFTP connection open."""
        store = self.grant["store"]
        place = [*self.arguments(), "-p", str(store["port"]), "-s", f"{account}@127.0.0.1", "sftp"]
        process = subprocess.Popen(
            ["ssh", *place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        link = Link(process)
        try:
            link.ask()
            yield link
        finally:
            process.kill()
            process.communicate()


class Link:
    """A standing connection."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def ask(self) -> None:
        """See that the other side answers."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(SFTP_INIT)
        answer = self.process.stdout.read(5)
        assert len(answer) == 5, self.process.stderr and self.process.stderr.read()
        assert answer[4] == 2
        self.process.stdout.read(struct.unpack(">I", answer[:4])[0] - 1)

    def closed_after(self, seconds: float) -> float:
        """Return the seconds until the other side was gone, at most ``seconds``."""
        begun = time.monotonic()
        self.process.wait(timeout=seconds)
        return time.monotonic() - begun

    @property
    def stands(self) -> bool:
        return self.process.poll() is None


class RealStore:
    """A store of its own: folder, accounts and ports that nobody else has."""

    def __init__(
        self,
        *,
        lease_minutes: float = 5,
        sites: str = "",
        lines: str = "",
        bind: str = "127.0.0.1",
        further: tuple[str, ...] = (),
        **limits: float,
    ) -> None:
        # sshd wants a path that belongs to root all the way, which /tmp does not.
        self.home = Path(tempfile.mkdtemp(prefix="kakehashi-test-", dir="/srv"))
        self.home.chmod(0o755)
        self.prefix = f"t{secrets.token_hex(3)}"
        self.sshd_port, self.http_port = free_port(), free_port()
        self.config_path = self.home / "kakehashi.toml"
        self.limits = {"lease_minutes": lease_minutes, **limits}
        self.sites, self.lines = sites, lines
        self.bind, self.further = bind, further
        self.projects = {"lung": "2099-12-31", "brain": "2099-12-31", "old": "2020-01-01"}
        self.process: subprocess.Popen[bytes] | None = None
        self._write_config()
        self.layout = Layout(self.home / "store")
        self.account = names(self.config.need_store()).authority
        self.nodes = self.home / "nodes"
        try:
            self._initialise()
        except BaseException:
            self.remove()
            raise

    def _initialise(self) -> None:
        sshd.initialise(self.config)
        for project in self.projects:
            self.publish(project)
        with acting_as(self.account):
            token = hubs.add(self.layout.hubs, "hub")
        self.hub = Hub(self.http_port, token.reveal())
        self.nodes.mkdir(mode=0o700)

    def _write_config(self) -> None:
        limits = "\n".join(f"{name} = {value}" for name, value in self.limits.items())
        projects = "\n".join(
            f"""
            [[projects]]
            id = "{name}"
            title = "About {name}"
            purpose = "A test"
            approval = "2026-1"
            expires = {expires}
            groups = ["g-{name}"]
            sites = ["here"]
            """
            for name, expires in self.projects.items()
        )
        self.config_path.write_text(
            f"""
            [store]
            root = "{self.home}/store"
            address = "127.0.0.1"
            port = {self.sshd_port}
            bind = "{self.bind}"
            further_addresses = {json.dumps(self.further)}
            bind_port = {self.sshd_port}
            authority_port = {self.http_port}
            account_prefix = "{self.prefix}"
            audit_anchors = ["{self.home}/elsewhere/anchor"]
            {self.lines}
            [store.limits]
            {limits}
            {self.sites}
            {projects}
            """
        )
        self.config = load(self.config_path)

    def publish(self, project: str) -> None:
        """Lay a view by hand."""
        view = self.layout.view(project)
        (view / "series").mkdir(exist_ok=True)
        (view / "series" / "1.2.ozx").write_bytes(project.encode() * 100)
        manifest = {"kakehashi_manifest": 1, "project": project, "files": [{"path": "x"}]}
        (view / "manifest.json").write_text(json.dumps(manifest))

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", SERVE, str(self.config_path)],
            stdout=subprocess.PIPE,
            stderr=(self.home / "serve.err").open("ab"),
            cwd="/",
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith(b"ready"), self.logs()

    def stop(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGTERM)
            try:
                assert self.process.wait(timeout=15) == 0, self.logs()
            finally:
                self.kill()

    def kill(self) -> None:
        """Kill the supervisor, and it alone."""
        assert self.process
        assert self.process.stdout
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process = None

    def reload(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGHUP)

    def logs(self) -> str:
        texts = [(self.home / "serve.err").read_text()]
        texts += [f"{p.name}:\n{p.read_text()}" for p in sorted(self.layout.log.glob("*.log"))]
        return "\n".join(texts)[-6000:]

    def pid(self, service: str) -> int:
        """Return the pid, as the tests see it, of one of the store's processes; 0 if gone."""
        inside = json.loads((self.layout.run / "services.json").read_text())[service]
        assert self.process
        table = processes()
        family = {self.process.pid}
        while more := {p.pid for p in table.values() if p.parent in family} - family:
            family |= more
        for pid in family:
            with contextlib.suppress(FileNotFoundError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                chain = next(line for line in lines if line.startswith("NSpid:")).split()[1:]
                if len(chain) > 1 and chain[-1] == str(inside):
                    return pid
        return 0

    def records(self, session: str | None = None, kind: str | None = None) -> list[Record]:
        found = Audit(self.layout.audit).records()
        return [
            record
            for record in found
            if (session is None or record.session == session)
            and (kind is None or record.kind == kind)
        ]

    def node(self) -> Node:
        return Node(self.nodes)

    def thief(self, victim: Node, ca: Ed25519PrivateKey, *accounts: str) -> Node:
        """Return what somebody has who stole a CA and a node's key, and knows the book."""
        thief = self.node()
        for name in ("key", "key.pub"):
            shutil.copy(victim.folder / name, thief.folder / name)
        serial = victim.grant["serial"]
        builder = (
            SSHCertificateBuilder()
            .public_key(victim.key.public_key())
            .serial(serial)
            .type(SSHCertificateType.USER)
            .key_id(f"{victim.grant['session']}:{serial}".encode())
            .valid_principals([name.encode() for name in accounts or (self.view(),)])
            .valid_after(1000)
            .valid_before(2**40)
        )
        thief.take({**victim.grant, "certificate": builder.sign(ca).public_bytes().decode()})
        return thief

    def session(self, **changes: object) -> tuple[str, Node, dict[str, Any]]:
        """Open a session and redeem its ticket."""
        created = self.hub.create(**changes).ok()
        node = self.node()
        node.take(self.hub.grant(created, node).ok())
        return created["session"], node, created

    def view(self, project: str = "lung") -> str:
        return f"{self.prefix}v-{project}"

    def work(self, project: str = "lung") -> str:
        return f"{self.prefix}w-{project}"

    def remove(self) -> None:
        """Take away everything that this store brought onto the machine."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.home)
            stack.callback(self._remove_accounts)
            self.stop()

    def _remove_accounts(self) -> None:
        for entry in pwd.getpwall():
            if entry.pw_name.startswith(self.prefix):
                _until_unlocked(["userdel", entry.pw_name])
        # Those that did not go with their account.
        for group in grp.getgrall():
            if group.gr_name.startswith(self.prefix):
                _until_unlocked(["groupdel", group.gr_name])


def _until_unlocked(arguments: list[str]) -> None:
    def done() -> bool:
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert result.returncode == 0 or "lock" in result.stderr, result.stderr
        return result.returncode == 0

    until(done, seconds=30, what=" ".join(arguments))
