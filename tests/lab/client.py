"""A person without a browser: log-in, session and kernel over HTTP, as scripts would do it."""

from __future__ import annotations

import contextlib
import json
import re
import ssl
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import websocket

from tests.lab.people import PEOPLE


class ClientError(Exception):
    """The portal did not do what was asked; the message holds its words."""


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "form" and self.action is None:
            self.action = values.get("action") or ""
        if tag == "input" and values.get("name"):
            self.fields[str(values["name"])] = values.get("value") or ""


@dataclass(frozen=True)
class Ran:
    """What came of a cell."""

    text: str
    error: str | None


class Client:
    """One person at one portal.

    Parameters
    ----------
    url : str
        The portal's address.
    name : str
        The person at the identity provider.
    ca_file : str or bool
        Certificate authority of the portal; False does not check (only where TLS is not what
        is tested).
    """

    def __init__(self, url: str, name: str, ca_file: str | bool = True) -> None:
        self.url = url
        self.name = name
        self.http = requests.Session()
        # The environment's own bundle would win over the one given here.
        self.http.trust_env = False
        self.http.verify = ca_file
        self._ca_file = ca_file

    def log_in(self, password: str | None = None) -> requests.Response:
        """Log in at the identity provider; return the page that follows."""
        if password is None:
            password = next(person.password for person in PEOPLE if person.name == self.name)
        page = self.http.get(f"{self.url}/hub/oauth_login", params={"next": "/hub/home"})
        forms = _Forms()
        forms.feed(page.text)
        if forms.action is None:
            raise ClientError(f"no log-in form at {page.url}: {page.status_code}")
        fields = {**forms.fields, "login": self.name, "password": password}
        return self.http.post(urljoin(page.url, forms.action), data=fields)

    def _xsrf(self, path: str) -> str:
        # The most specific cookie for a path is the one that the server there compares with.
        tokens = [c for c in self.http.cookies if c.name == "_xsrf" and path.startswith(c.path)]
        return max(tokens, key=lambda cookie: len(cookie.path)).value or "" if tokens else ""

    def call(
        self, method: str, path: str, document: object = None, **options: Any
    ) -> requests.Response:
        """Call an API of the hub or of the person's server (path below the portal's address)."""
        return self.http.request(
            method,
            self.url + path,
            json=document,
            headers={"X-XSRFToken": self._xsrf(path), "Referer": self.url + "/hub/home"},
            **options,
        )

    def start(self, options: Mapping[str, object], seconds: float = 120) -> None:
        """Start a session and wait until it is ready."""
        answer = self.call("POST", f"/hub/api/users/{self.name}/server", options)
        if answer.status_code not in {201, 202}:
            raise ClientError(f"start: {answer.status_code} {answer.text[:1000]}")
        self.wait_ready(seconds)

    def wait_ready(self, seconds: float = 120) -> None:
        """Wait until the pending session is ready; raise with its last message where it fails."""
        with self.http.get(
            f"{self.url}/hub/api/users/{self.name}/server/progress",
            headers={"X-XSRFToken": self._xsrf("/hub/api/"), "Referer": self.url + "/hub/home"},
            stream=True,
            timeout=seconds,
        ) as stream:
            last: dict[str, Any] = {}
            for line in stream.iter_lines():
                if line.startswith(b"data:"):
                    last = json.loads(line[5:])
                    if last.get("failed"):
                        raise ClientError(f"the session failed: {last.get('message')}")
                    if last.get("ready"):
                        return
        raise ClientError(f"the session did not become ready: {last}")

    def server(self) -> dict[str, Any] | None:
        """Return the hub's record of the person's server, or None."""
        user = self.call("GET", f"/hub/api/users/{self.name}").json()
        return (user.get("servers") or {}).get("")

    def stop(self, seconds: float = 60) -> None:
        """Stop the session and wait until the hub says that it has ended."""
        self.call("DELETE", f"/hub/api/users/{self.name}/server")
        deadline = time.monotonic() + seconds
        while self.server() is not None:
            if time.monotonic() > deadline:
                raise ClientError("the session did not stop")
            time.sleep(0.1)  # the pause of a poll with a deadline
        # The next server does not know the log-in of this one.
        for cookie in list(self.http.cookies):
            if cookie.path == f"/user/{self.name}/":
                self.http.cookies.clear(cookie.domain, cookie.path, cookie.name)

    def enter_lab(self) -> None:
        """Get the cookies of the person's server by its log-in through the hub."""
        page = self.http.get(f"{self.url}/user/{self.name}/lab")
        if page.status_code != 200:
            raise ClientError(f"lab: {page.status_code} {page.text[:500]}")

    @contextlib.contextmanager
    def kernel(self) -> Iterator[Kernel]:
        """Give a kernel in the person's session."""
        if not any(c.path == f"/user/{self.name}/" for c in self.http.cookies):
            self.enter_lab()
        base = f"/user/{self.name}/api/kernels"
        answer = self.call("POST", base, {"name": "python3"})
        if answer.status_code != 201:
            raise ClientError(f"kernel: {answer.status_code} {answer.text[:500]}")
        identity = answer.json()["id"]
        kernel = Kernel(self._socket(f"{base}/{identity}/channels"))
        try:
            yield kernel
        finally:
            kernel.close()
            self.call("DELETE", f"{base}/{identity}")

    def _socket(self, path: str) -> websocket.WebSocket:
        parts = urlsplit(self.url)
        scheme = "wss" if parts.scheme == "https" else "ws"
        request = requests.Request("GET", self.url + path)
        cookies = self.http.prepare_request(request).headers.get("Cookie", "")
        options: dict[str, Any] = {}
        if self._ca_file is False:
            options["cert_reqs"] = ssl.CERT_NONE
        elif isinstance(self._ca_file, str):
            options["ca_certs"] = self._ca_file
        return websocket.create_connection(
            f"{scheme}://{parts.netloc}{path}", header=[f"Cookie: {cookies}"],
            origin=self.url, sslopt=options, timeout=60,
        )  # fmt: skip


class Kernel:
    """A kernel's channels."""

    def __init__(self, channel: websocket.WebSocket) -> None:
        self._channel = channel

    def run(self, code: str) -> Ran:
        """Run a cell; return what it printed, its value, and its error."""
        identity = uuid.uuid4().hex
        header = {"msg_id": identity, "msg_type": "execute_request", "username": "",
            "session": identity,
                  "version": "5.3", "date": ""}  # fmt: skip
        content = {"code": code, "silent": False, "store_history": False, "user_expressions": {},
                   "allow_stdin": False, "stop_on_error": True}  # fmt: skip
        self._channel.send(
            json.dumps({"header": header, "parent_header": {}, "metadata": {}, "content": content,
                        "channel": "shell", "buffers": []})
        )  # fmt: skip
        text: list[str] = []
        error: str | None = None
        replied = idle = False
        while not (replied and idle):
            message = json.loads(self._channel.recv())
            if message["parent_header"].get("msg_id") != identity:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text.append(content["text"])
            elif kind in {"execute_result", "display_data"}:
                text.append(content["data"].get("text/plain", ""))
            elif kind == "error":
                plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"]))
                error = f"{content['ename']}: {content['evalue']}\n{plain}"
            elif kind == "execute_reply":
                replied = True
            elif kind == "status" and content["execution_state"] == "idle":
                idle = True
        return Ran("".join(text), error)

    def value(self, expression: str) -> Any:
        """Return a JSON-able expression's value."""
        ran = self.run(f"import json as _j; print(_j.dumps({expression}))")
        if ran.error is not None:
            raise ClientError(ran.error)
        return json.loads(ran.text)

    def close(self) -> None:
        """Close the channels."""
        self._channel.close()
