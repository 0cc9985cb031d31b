"""One person at a portal over HTTP: session and kernel, as scripts would do it."""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
import websocket

from kakehashi.errors import KakehashiError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kakehashi.secret import Secret

ANSWER_S = 60.0


class VisitError(KakehashiError):
    """The portal did not do what was asked; the message holds its words."""


@dataclass(frozen=True)
class Ran:
    """What came of a cell."""

    text: str
    error: str | None


class Visitor:
    """One person at one portal.

    Parameters
    ----------
    url : str
        The portal's address.
    name : str
        The person at the identity provider.
    ca_file : str or None
        Certificate authority of the portal; the machine's own list by default.
    token : Secret or None
        The person's own token of the portal; without one a subclass has logged in.
    """

    def __init__(
        self, url: str, name: str, ca_file: str | None = None, token: Secret | None = None
    ) -> None:
        self.url = url
        self.name = name
        self.http = requests.Session()
        # The environment's own bundle would win over the one given here.
        self.http.trust_env = False
        self.http.verify = True if ca_file is None else ca_file
        self._ca_file = ca_file
        self._token = token

    def headers(self, path: str) -> dict[str, str]:  # noqa: ARG002 - a cookie's depend on the path
        """Return what makes a call to a path the person's."""
        return {} if self._token is None else {"Authorization": f"token {self._token.reveal()}"}

    def call(
        self, method: str, path: str, document: Any = None, **options: Any
    ) -> requests.Response:
        """Call an API of the hub or of the person's server (path below the portal's address)."""
        return self.http.request(
            method, self.url + path, json=document, headers=self.headers(path), **options
        )

    def start(self, options: Mapping[str, object], seconds: float = 120) -> None:
        """Start a session and wait until it is ready."""
        answer = self.call("POST", f"/hub/api/users/{self.name}/server", options)
        if answer.status_code not in {201, 202}:
            raise VisitError(f"start: {answer.status_code} {answer.text[:1000]}")
        self.wait_ready(seconds)

    def wait_ready(self, seconds: float = 120) -> None:
        """Wait until the pending session is ready; raise with its last message where it fails."""
        with self.http.get(
            f"{self.url}/hub/api/users/{self.name}/server/progress",
            headers=self.headers("/hub/api/"),
            stream=True,
            timeout=seconds,
        ) as stream:
            last: dict[str, Any] = {}
            for line in stream.iter_lines():
                if line.startswith(b"data:"):
                    last = json.loads(line[5:])
                    if last.get("failed"):
                        raise VisitError(f"the session failed: {last.get('message')}")
                    if last.get("ready"):
                        return
        raise VisitError(f"the session did not become ready: {last}")

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
                raise VisitError("the session did not stop")
            time.sleep(0.1)  # the pause of a poll with a deadline

    @contextlib.contextmanager
    def kernel(self) -> Iterator[Kernel]:
        """Give a kernel in the person's session."""
        base = f"/user/{self.name}/api/kernels"
        answer = self.call("POST", base, {"name": "python3"})
        if answer.status_code != 201:
            raise VisitError(f"kernel: {answer.status_code} {answer.text[:500]}")
        identity = answer.json()["id"]
        kernel = Kernel(self._socket(f"{base}/{identity}/channels"))
        try:
            yield kernel
        finally:
            kernel.close()
            with contextlib.suppress(requests.RequestException):
                self.call("DELETE", f"{base}/{identity}", timeout=ANSWER_S)

    def _socket(self, path: str) -> websocket.WebSocket:
        parts = urlsplit(self.url)
        scheme = "wss" if parts.scheme == "https" else "ws"
        request = requests.Request("GET", self.url + path)
        prepared = self.http.prepare_request(request).headers
        headers = {**self.headers(path), "Cookie": str(prepared.get("Cookie", ""))}
        options: dict[str, Any] = {}
        if self._ca_file is not None:
            options["ca_certs"] = self._ca_file
        return websocket.create_connection(
            f"{scheme}://{parts.netloc}{path}",
            header=[f"{name}: {value}" for name, value in headers.items()],
            origin=self.url,
            sslopt=options,
            timeout=ANSWER_S,
        )


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
            raise VisitError(ran.error)
        return json.loads(ran.text)

    def close(self) -> None:
        """Close the channels."""
        self._channel.close()
