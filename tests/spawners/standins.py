"""The login server's neighbours in its tests: a store's authority, and a running hub.

The authority here stands at the outermost edge: the real one has tests of its own, and the lab
has both. Everything between is real: hub, proxy, agent, processes of other accounts, TLS.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import http.server
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jwt
import requests

from kakehashi import __version__

REPOSITORY = Path(__file__).resolve().parents[2]
ENDS = "2099-01-01T00:00:00Z"
# Accounts that every Debian has; the tests' people compute as these.
ACCOUNTS = {"alice": "games", "bob": "news", "carol": "mail"}
GROUPS = {"alice": ["lung-study"], "bob": ["brain-study"], "dave": []}
PROJECTS = {
    "lung": {"groups": ["lung-study"], "title": "Lung"},
    "brain": {"groups": ["brain-study"], "title": "Brain"},
}


def until(what: str, condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait for a condition with a deadline and return what it gave."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"after {seconds:g} s still waiting for: {what}"
        threading.Event().wait(0.05)


@dataclass
class Authority:
    """A store's authority as far as a hub sees one."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    software: str = __version__
    down: bool = False
    projects: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(PROJECTS))
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    audit: list[dict[str, Any]] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def listed(self, groups: list[str]) -> list[dict[str, Any]]:
        return [
            {
                "id": name,
                "title": project["title"],
                "title_ja": None,
                "purpose": "testing",
                "expires": "2099-01-01",
                "sites": ["here", "elsewhere"],
                "series": 3,
            }
            for name, project in self.projects.items()
            if set(groups) & set(project["groups"])
        ]

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        parts = path.strip("/").split("/")[1:]
        if parts == ["version"]:
            return 200, {"software": self.software, "api": 1}
        if parts == ["projects"]:
            return 200, {"projects": self.listed(body["groups"])}
        if parts == ["sessions"]:
            session, ticket = secrets.token_hex(16), secrets.token_urlsafe(32)
            self.sessions[session] = {**body, "ticket": hashlib.sha256(ticket.encode()).hexdigest()}
            return 200, {"session": session, "ticket": ticket, "ends_at": ENDS}
        if parts == ["sessions", "states"]:
            found = {
                name: self.sessions[name] for name in body["sessions"] if name in self.sessions
            }
            return 200, {
                "states": {
                    name: {
                        "state": "ended" if "ended" in session else "granted",
                        "reason": session.get("ended"),
                    }
                    for name, session in found.items()
                }
            }
        if parts == ["witness"]:
            self.said.append(body)
            return 200, {"jobs": []}
        if parts == ["audit"]:
            self.audit.append(body)
            return 200, {"seq": len(self.audit)}
        session = self.sessions.get(parts[1] if parts[0] == "sessions" else body["session"])
        if session is None:
            return 404, {"error": "unknown-session", "message": "there is no such session"}
        return self._about(session, method, parts, body)

    def _about(
        self, session: dict[str, Any], method: str, parts: list[str], body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        if parts == ["grants"]:
            if hashlib.sha256(body["ticket"].encode()).hexdigest() != session["ticket"]:
                return 403, {"error": "ticket", "message": "the ticket is not this session's"}
            if "grant" in session:
                session["alarm"] = True
                return 409, {"error": "replayed", "message": "the ticket was used already"}
            session["grant"] = body
            return 200, self.grant(body["session"])
        if parts == ["leases"]:
            return 200, self.grant(body["session"])
        verb = parts[2]
        if verb == "end":
            session.setdefault("ends", []).append(body)
        if verb == "report":
            session["report"] = body
        if verb == "ending":
            session["ending"] = body
        if verb == "revoke":
            session["revoked"] = body
            self.revoked.append(parts[1])
        if verb in {"end", "receipt"}:
            if "ends" not in session:
                return 404, {"error": "no-receipt", "message": "no receipt yet"}
            return 200, {
                "session": parts[1],
                "person": session["person"],
                "state": "pending" if verb == "end" else "complete",
                "ended_at": ENDS,
                "items": [{"item": "ticket", "result": "gone"}],
            }
        return 200, {}

    def grant(self, session: str) -> dict[str, Any]:
        return {
            "session": session,
            "serial": 1,
            "issued_at": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "expires_at": ENDS,
            "ends_at": ENDS,
        }

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.audit if record["kind"] == kind]


@contextmanager
def serving(authority: Authority) -> Iterator[Authority]:
    """Serve an authority on the loopback address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length) or b"{}")
            if authority.down:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if self.headers["Authorization"] != f"Bearer {authority.token}":
                status, answer = 401, {"error": "credential", "message": "no"}
            else:
                status, answer = authority.answer(self.command, self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._do()

        def do_POST(self) -> None:
            self._do()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    authority.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield authority
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Provider:
    """An OpenID Connect provider: code flow with PKCE, refresh tokens good for one use."""

    url: str = ""
    amr: list[str] = field(default_factory=list)
    ahead_s: float = 0.0
    down: bool = False
    blocked: set[str] = field(default_factory=set)
    groups: dict[str, list[str]] = field(
        default_factory=lambda: {k: list(v) for k, v in GROUPS.items()}
    )
    codes: dict[str, tuple[str, str]] = field(default_factory=dict)
    access: dict[str, str] = field(default_factory=dict)
    refresh: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    reused: int = 0

    def authorize(self, query: dict[str, str], person: str) -> str:
        assert query["code_challenge_method"] == "S256"
        code = secrets.token_urlsafe(8)
        self.codes[code] = (person, query["code_challenge"])
        return f"{query['redirect_uri']}?code={code}&state={query['state']}"

    def token(self, form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if form["grant_type"] == "authorization_code":
            person, challenge = self.codes.pop(form["code"])
            shown = hashlib.sha256(form["code_verifier"].encode()).digest()
            if base64.urlsafe_b64encode(shown).decode().rstrip("=") != challenge:
                return 400, {"error": "invalid_grant"}
        else:
            person = self.refresh.pop(form["refresh_token"], "")
            if not person:
                self.reused += 1
        if not person or person in self.blocked:
            return 400, {"error": "invalid_grant"}
        access, refresh = secrets.token_urlsafe(8), secrets.token_urlsafe(8)
        self.access, self.refresh[refresh] = {**self.access, access: person}, person
        claims = {
            "iss": self.url,
            "aud": "tests",
            "sub": person,
            "exp": int(time.time() + self.ahead_s) + 300,
            "amr": self.amr,
        }
        return 200, {
            "access_token": access,
            "refresh_token": refresh,
            "token_type": "Bearer",
            "id_token": jwt.encode(claims, "k" * 32, algorithm="HS256"),
        }

    def me(self, access: str) -> tuple[int, dict[str, Any]]:
        self.asked += 1
        person = self.access.get(access)
        if person is None or person in self.blocked:
            return 401, {"error": "invalid_token"}
        return 200, {
            "sub": person,
            "preferred_username": person,
            "groups": self.groups.get(person, []),
        }


@contextmanager
def providing(provider: Provider) -> Iterator[Provider]:
    """Serve a provider on the loopback address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            form = dict(parse_qsl(self.rfile.read(length).decode()))
            parts = urlsplit(self.path)
            if provider.down:
                status, answer = 503, {"error": "down"}
            elif parts.path == "/token":
                status, answer = provider.token(form)
            else:
                status, answer = provider.me(self.headers["Authorization"].split()[1])
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._do()

        def do_POST(self) -> None:
            self._do()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    provider.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_ports(count: int) -> list[int]:
    """Return ports that were free just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


TOML = """
[portal]
url = "http://127.0.0.1:{port}"
port = {port}
hub_port = {hub_port}
proxy_api_port = {api_port}
state = "{folder}/state"

[identity]
issuer = "{provider}"
authorize_url = "{provider}/auth"
token_url = "{provider}/token"
userdata_url = "{provider}/me"
client_id = "tests"
client_secret_file = "{folder}/client-secret"
admin_groups = ["administrators"]
{claim}
callback_url = "http://127.0.0.1:{port}/hub/oauth_callback"

[authority]
url = "{authority}"
token_file = "{folder}/authority-token"
timeout_s = 5

[sites.here]
title = "Here"
scheduler = "none"
agent = ["{python}", "-I", "-m", "kakehashi.site.agent", "--site", "{folder}/site.json"]
addresses = ["{addresses}"]
accounts = {{ alice = "games", bob = "news" }}
start_timeout_s = 60

[sites.here.node]
software = "{software}"

[[sites.here.queues]]
name = "local"
max_gpus = 0
max_hours = 4

[[sites.here.queues]]
name = "gone"
max_hours = 4

[sites.elsewhere]
title = "Elsewhere"
scheduler = "slurm"
agent = ["/bin/false"]
addresses = ["192.0.2.0/24"]
accounts = {{ bob = "bob" }}
queues = [{{ name = "gpu", max_gpus = 2 }}]
"""

CONFIG = """
import os, sys
from pathlib import Path
from jupyterhub.auth import DummyAuthenticator
from kakehashi.config import load
from kakehashi_spawners.configure import configure

GROUPS = {groups!r}


class Known(DummyAuthenticator):
    manage_groups = True

    def authenticate(self, handler, data):
        if data["username"] not in GROUPS:
            return None
        return {{"name": data["username"], "groups": GROUPS[data["username"]]}}


c = get_config()
configure(c, load(Path(os.environ["KAKEHASHI_CONFIG"])))
if not {oidc!r}:
    c.JupyterHub.authenticator_class = Known
    c.Known.allow_all = True
    c.Known.password = ""
c.KakehashiSpawner.poll_interval = 1
c.KakehashiSpawner.right_interval = {right_s!r}
c.KakehashiAuthenticator.fresh_s = {right_s!r} / 5
c.JupyterHub.log_level = "INFO"
# A request to start comes back soon, and the tests look on.
c.JupyterHub.tornado_settings["slow_spawn_timeout"] = 1
"""


@dataclass
class Hub:
    """A running JupyterHub with its proxy, configured by ``configure``."""

    folder: Path
    software: Path
    port: int
    hub_port: int
    authority: Authority
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        log = (self.folder / "hub.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyterhub", "-f", str(self.folder / "config.py")],
            cwd=self.folder,
            stdout=log,
            stderr=log,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.folder),
                "KAKEHASHI_CONFIG": str(self.folder / "kakehashi.toml"),
            },
        )
        until("the hub to answer", self._answers, 40)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()[-4000:]
        try:
            return requests.get(f"{self.url}/hub/api/", timeout=2).status_code == 200
        except requests.RequestException:
            return False

    def kill(self) -> None:
        """Kill the hub as a power cut would; its proxy goes on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        pid_file = self.folder / "state" / "proxy.pid"
        if pid_file.exists():
            self._end(int(pid_file.read_text()), "configurable-http-proxy")
        for facts in (self.software / "seen").glob("facts-*.json"):
            self._end(json.loads(facts.read_text())["pid"], str(self.software))

    def settle(self) -> None:
        """End what a test has left running, so that the next one starts from nothing."""
        self.authority.down = False
        if all("ends" in session for session in self.authority.sessions.values()):
            return
        for name in ("alice", "bob"):
            person = self.login(name)
            if person.server():
                person.stop()

    @staticmethod
    def _end(pid: int, mark: str) -> None:
        try:
            ours = mark in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            if ours:
                os.kill(pid, 9)
        except OSError:
            pass

    def log(self) -> str:
        return (self.folder / "hub.log").read_text(errors="replace")

    def plan(self, **plan: Any) -> None:
        """Say what the next wrapper does."""
        (self.software / "plan.json").write_text(json.dumps(plan))

    def seen(self, kind: str, session: str) -> dict[str, Any]:
        """Wait for what a wrapper has written down."""
        path = self.software / "seen" / f"{kind}-{session}.json"
        until(f"{path.name} ({self.log()[-1500:]})", path.exists)
        value: dict[str, Any] = json.loads(path.read_text())
        return value

    def login(self, person: str) -> Person:
        browser = requests.Session()
        browser.get(f"{self.url}/hub/login", timeout=10)
        xsrf = browser.cookies.get("_xsrf", path="/hub/")
        answer = browser.post(
            f"{self.url}/hub/login",
            data={"username": person, "password": "", "_xsrf": xsrf},
            timeout=20,
            allow_redirects=False,
        )
        assert answer.status_code == 302, answer.text
        return Person(self, person, browser)

    def login_oidc(self, person: str, provider: Provider) -> tuple[Person, requests.Response]:
        """Go through the code flow; the provider asks no questions."""
        browser = requests.Session()
        away = browser.get(f"{self.url}/hub/oauth_login", timeout=10, allow_redirects=False)
        query = dict(parse_qsl(urlsplit(away.headers["Location"]).query))
        back = browser.get(provider.authorize(query, person), timeout=20, allow_redirects=False)
        return Person(self, person, browser), back

    def post(self, call: str, body: Any, **headers: str) -> requests.Response:
        """Call one of the nodes' addresses through the proxy."""
        return requests.post(
            f"{self.url}/hub/api/kakehashi/{call}",
            data=body if isinstance(body, bytes) else json.dumps(body),
            headers={"Content-Type": "application/json", **headers},
            timeout=90,
        )


@dataclass
class Person:
    """Somebody in front of a browser."""

    hub: Hub
    name: str
    browser: requests.Session

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        page = self.browser.get(f"{self.hub.url}/hub/home", timeout=20)
        assert page.status_code == 200, page.text[:500]
        xsrf = self.browser.cookies.get("_xsrf", path="/hub/")
        return self.browser.request(
            method,
            f"{self.hub.url}/hub/{path}",
            headers={
                "X-XSRFToken": xsrf,
                "Sec-Fetch-Mode": "cors",
                "Sec-Fetch-Site": "same-origin",
            },
            timeout=90,
            allow_redirects=False,
            **options,
        )

    def spawn(self, **options: Any) -> requests.Response:
        chosen = {"site": "here", "queue": "local", "gpus": 0, "hours": 1, "project": "lung"}
        return self.call(
            "POST",
            f"api/users/{self.name}/server",
            json={"user_options": {**chosen, **options}},
        )

    def server(self) -> dict[str, Any]:
        model = self.call("GET", f"api/users/{self.name}").json()
        value: dict[str, Any] = model["servers"].get("", {})
        return value

    def ready(self) -> dict[str, Any]:
        value: dict[str, Any] = until(
            f"{self.name}'s server ({self.hub.log()[-2000:]})",
            lambda: (server := self.server()).get("ready") and server,
        )
        return value

    def stop(self) -> None:
        answer = self.call("DELETE", f"api/users/{self.name}/server")
        assert answer.status_code in {202, 204}, answer.text
        until("the server to be gone", lambda: not self.server())

    def last_session(self) -> str:
        """Return the newest session that the authority opened for this person."""
        sessions = until(
            "a session",
            lambda: [
                name
                for name, session in self.hub.authority.sessions.items()
                if session["person"] == self.name
            ],
        )
        return str(sessions[-1])


@contextmanager
def running_hub(
    authority: Authority,
    addresses: str = "127.0.0.0/8",
    provider: Provider | None = None,
    claim: str = "",
    right_s: float = 25,
) -> Iterator[Hub]:
    """Start a hub whose site ``here`` is this machine, and end it with all it has started."""
    folder = Path(tempfile.mkdtemp(prefix="kk-hub-"))
    # Other accounts start the wrapper from here, and write down what they saw.
    folder.chmod(0o711)
    software = folder / "software"
    program = software / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    text = Path(__file__).with_name("wrapper.py").read_text()
    program.write_text(f"#!/usr/bin/python3 -I\n{text}")
    program.chmod(0o755)
    for part in (software, software / ".venv", program.parent):
        part.chmod(0o755)
    (software / "seen").mkdir()
    (software / "seen").chmod(0o1777)
    port, hub_port, api_port = free_ports(3)
    for name, secret in (("client-secret", "x"), ("authority-token", authority.token)):
        (folder / name).write_text(secret)
        (folder / name).chmod(0o600)
    (folder / "site.json").write_text(
        json.dumps(
            {
                "scheduler": "none",
                "accounts": sorted(ACCOUNTS.values()),
                "software": str(software),
                "queues": ["local"],
            }
        )
    )
    (folder / "kakehashi.toml").write_text(
        TOML.format(
            port=port,
            hub_port=hub_port,
            api_port=api_port,
            folder=folder,
            authority=authority.url,
            python=sys.executable,
            addresses=addresses,
            software=software,
            provider="http://127.0.0.1:1" if provider is None else provider.url,
            claim=claim,
        )
    )
    (folder / "config.py").write_text(
        CONFIG.format(groups=GROUPS, oidc=provider is not None, right_s=right_s)
    )
    hub = Hub(folder, software, port, hub_port, authority)
    hub.plan(mode="serve")
    try:
        hub.start()
        yield hub
    finally:
        hub.stop()
        shutil.rmtree(folder, ignore_errors=True)
