"""A real session on this machine: person, node, store, and a portal as a node sees one.

Real are the store (accounts, sshd, certificates, authority, guard), ssh, sshfs, the verified
view, FUSE, the namespaces and the person's account. The portal alone is a stand-in, since it is
the outermost edge here: it passes each call on to the store's real authority, as the hub does.
"""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kakehashi import __version__
from kakehashi.session import build_libraries, libraries
from kakehashi.session.processes import descendants
from tests.authority.real import Hub, RealStore, until
from tests.link.stores import StoreFolder, random_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = Path(__file__).resolve().parents[2] / "src"
SERIES = "1.2.826.0.1.3680043.2.1125.1"
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run")
# A private device folder with a FUSE node that everybody may open, as on a compute node.
AS_PERSON = """
mount -t tmpfs -o mode=0755 none /mnt
mknod -m 0666 /mnt/fuse c 10 229
mount --bind /mnt/fuse /dev/fuse
exec setpriv --reuid "$1" --regid "$2" --clear-groups --inh-caps=-all -- env -i "${@:3}"
"""


class Person:
    """An account of this machine, made for the tests."""

    def __init__(self) -> None:
        self.name = f"kn{secrets.token_hex(3)}"
        self.home = Path(tempfile.mkdtemp(prefix="kakehashi-home-", dir="/srv"))
        arguments = ["useradd", "--no-create-home", "--home-dir", str(self.home), self.name]
        until(
            lambda: subprocess.run(arguments, capture_output=True, check=False).returncode == 0,
            seconds=30,
            what="the account",
        )
        entry = pwd.getpwnam(self.name)
        self.uid, self.gid = entry.pw_uid, entry.pw_gid
        os.chown(self.home, self.uid, self.gid)

    def command(self, *argv: str, **environment: str) -> list[str]:
        """Return the argument list that runs a program as this person."""
        env = {"PATH": "/usr/bin:/bin", "HOME": str(self.home), **environment}
        words = [f"{name}={value}" for name, value in env.items()]
        namespace = ["unshare", "--mount", "--propagation", "private", "bash", "-ec", AS_PERSON]
        return [*namespace, "as-person", str(self.uid), str(self.gid), *words, *argv]

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*argv), capture_output=True, text=True, timeout=60, check=False, **options
        )

    def remove(self) -> None:
        subprocess.run(["userdel", "--force", self.name], capture_output=True, check=False)
        shutil.rmtree(self.home, ignore_errors=True)


class Software:
    """Kakehashi as it is installed on a node: readable for everybody, at a path of its own."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kakehashi-node-", dir="/srv"))
        self.root.chmod(0o755)
        venv = ["/usr/bin/python3", "-m", "venv", "--without-pip", str(self.root / ".venv")]
        subprocess.run(venv, check=True)
        shutil.copytree(
            SOURCE / "kakehashi",
            self.root / "src/kakehashi",
            ignore=shutil.ignore_patterns("__pycache__", *libraries.LIBRARIES),
        )
        site = next((self.root / ".venv/lib").glob("python3*/site-packages"))
        (site / "kakehashi.pth").write_text(f"{self.root}/src\n")
        binding = importlib.util.find_spec("mfusepy")
        assert binding
        assert binding.origin
        shutil.copy(binding.origin, site)
        build_libraries.build(self.root / "libexec")

    @property
    def python(self) -> str:
        return str(self.root / ".venv/bin/python")

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


@dataclass
class Portal:
    """The hub's four endpoints for nodes, before the store's real authority."""

    authority: Hub
    server: dict[str, Any]
    hub_port: int = 1
    offline_max_s: float = 3600.0
    down: bool = False
    lost: bool = False
    certificate: tuple[str, str] | None = None
    grants: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @contextlib.contextmanager
    def serve(self) -> Iterator[Portal]:
        portal = self

        class Endpoint(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                call = self.path.removeprefix("/hub/api/kakehashi/")
                portal.calls.append((call, body))
                if portal.down:
                    self.connection.close()
                    return
                status, answer = portal.answer(call, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = server.server_address[1]
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, call: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if call == "enrol":
            names = ("session", "ticket", "public_key", "host", "job", "walls", "software")
            request = {name: body[name] for name in names} | {"address": "127.0.0.1"}
            answer = self.authority.call("POST", "/v1/grants", request)
            if answer.status != 200:
                return answer.status, answer.body
            self.grants.append(answer.body)
            inside = body["hub_port"] or self.hub_port
            hub = {"address": f"127.0.0.1:{self.hub_port}", "port": inside}
            return 200, {
                "grant": answer.body,
                "server": self.server,
                "hub": hub,
                "offline_max_s": self.offline_max_s,
            }
        if call == "renew":
            if self.lost:
                return 410, {"error": "ended", "message": "the session was ended"}
            answer = self.authority.call("POST", "/v1/leases", body)
            return answer.status, answer.body
        if call == "leave":
            report = {"witness": "wrapper"} | {
                name: body[name] for name in ("message", "signature")
            }
            path = f"/v1/sessions/{body['session']}/report"
            answer = self.authority.call("POST", path, report)
            return answer.status, answer.body
        return 200, {}

    def called(self, call: str) -> list[dict[str, Any]]:
        return [body for name, body in self.calls if name == call]


class Session:
    """One run of the wrapper."""

    def __init__(
        self, world: World, portal: Portal, document: dict[str, Any], argv: list[str]
    ) -> None:
        self.world = world
        self.portal = portal
        self.document = document
        self.id = document["session"]
        self.before = world.listing()
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
        )
        assert self.process.stdin
        self.process.stdin.write(json.dumps(document).encode())
        self.process.stdin.close()
        self.process.stdin = None
        self.seen: dict[int, str] = {}

    @property
    def work(self) -> Path:
        """The project's work folder, as it lies at the store."""
        return self.world.store.layout.root / "work/lung/work"

    def wait(self, seconds: float = 60) -> tuple[int, str]:
        """Wait for the end; return exit status and what the wrapper said."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said.decode()

    def family(self) -> dict[int, str]:
        """Return all processes of the session, and remember them."""
        found = descendants(self.process.pid)
        self.seen |= found
        return found

    def file(self, name: str, seconds: float = 60) -> str:
        """Wait for a file that the payload has written, and return its text."""
        path = self.work / "alice" / name

        def ready() -> bool:
            if self.process.poll() is not None and not path.exists():
                raise AssertionError(f"ended: {self.wait()} {self.log()}")
            return path.exists() and path.stat().st_size > 0

        until(ready, seconds=seconds, what=name)
        return path.read_text()

    def log(self) -> str:
        path = self.work / ".kakehashi/logs" / f"{self.id}.log"
        return path.read_text() if path.exists() else ""

    def tree(self) -> dict[str, int]:
        """Name the wrapper's own processes, from the outside."""
        found = self.family()
        parents = {pid: _parent(pid) for pid in found}

        def child(of: int, names: tuple[str, ...]) -> int:
            return next(pid for pid in parents if parents[pid] == of and found[pid] in names)

        keeper = self.process.pid
        python = ("python", "python3", "python3.11")
        entering = next(
            pid
            for pid in sorted(found)
            if parents[pid] == keeper and found[pid] in python and not _view(pid)
        )
        warden = child(entering, python)
        middle = child(warden, python)
        return {
            "keeper": keeper,
            "entering": entering,
            "warden": warden,
            "middle": middle,
            "init": child(middle, python),
            "sshfs": child(keeper, ("sshfs",)),
            "ssh": child(keeper, ("ssh",)),
            "view": next(pid for pid in found if _view(pid)),
        }

    def all_gone(self) -> bool:
        """Tell whether none of the processes ever seen is left."""
        return not any(_alive(pid) for pid in self.seen)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def _parent(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[1])


def _view(pid: int) -> bool:
    return b"kakehashi.link.view" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text[text.rindex(")") + 2 :].split()[0] not in "ZX"


class World:
    """Everything that a session needs around it."""

    def __init__(self, store: RealStore, person: Person, software: Software) -> None:
        self.store = store
        self.person = person
        self.software = software
        self.folder = StoreFolder(store.layout.view("lung"))
        self.content = random_bytes(3 * self.folder.block_size + 77)
        self.folder.add(SERIES, self.content, modality="CT")

    def document(self, portal: Portal, **changes: Any) -> dict[str, Any]:
        hours = changes.pop("hours", 1)
        created = self.store.hub.create(hours=hours).ok()
        node = {
            "software": str(self.software.root),
            "read_only": [],
            "devices": [],
            "scratch_mb": 128,
            "allow_unencrypted_swap": True,
            "allow_sshfs_view": False,
            "walls": "namespaces",
            "allow_no_landlock": False,
        }
        node |= changes.pop("node", {})
        scheme = "https" if portal.certificate else "http"
        return {
            "session": created["session"],
            "ticket": created["ticket"],
            "portal_url": f"{scheme}://127.0.0.1:{portal.port}",
            "portal_ca": None,
            "site": "here",
            "node": node,
            "software": __version__,
        } | changes

    def clear(self) -> None:
        """Empty the work folder, so that a file there is of this session."""
        shutil.rmtree(self.store.layout.root / "work/lung/work/alice", ignore_errors=True)

    def listing(self) -> dict[str, frozenset[str]]:
        """Return what belongs to the person in the places where a session could leave files."""
        places = [*PLACES, str(self.person.home)]
        return {place: frozenset(self._owned(Path(place))) for place in places}

    def _owned(self, place: Path) -> Iterator[str]:
        for folder, _, files in os.walk(place):
            for path in [folder, *(f"{folder}/{name}" for name in files)]:
                with contextlib.suppress(OSError):
                    if os.lstat(path).st_uid == self.person.uid:
                        yield path

    @contextlib.contextmanager
    def session(
        self,
        script: str,
        *,
        portal: dict[str, Any] | None = None,
        run: Callable[[list[str]], list[str]] | None = None,
        **changes: Any,
    ) -> Iterator[Session]:
        """Run a session whose server is a Python script.

        ``portal`` changes the portal, ``run`` the argument list, others the document.
        """
        portal = dict(portal or {})
        server = {
            "argv": [self.software.python, "-c", script],
            "environment": {"GIVEN": "by the hub", "HOME": "/not/this/one"},
            "files": {"server.key": "key of the server"},
        } | portal.pop("server", {})
        argv = [self.software.python, "-I", "-m", "kakehashi.session.enter"]
        as_person = self.person.command(*argv, KAKEHASHI_JOB="7")
        self.clear()
        with Portal(self.store.hub, server, **portal).serve() as served:
            document = self.document(served, **changes)
            session = Session(self, served, document, run(as_person) if run else as_person)
            try:
                yield session
            finally:
                session.kill()
