"""Client of the store's authority, over HTTPS with the hub's own credential."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tornado.httpclient import HTTPError as HttpStatusError
from tornado.httpclient import HTTPRequest
from tornado.simple_httpclient import SimpleAsyncHTTPClient

from kakehashi.config import read_secret
from kakehashi.errors import RefusedError, StoreError
from kakehashi.secret import Secret
from kakehashi.store.arrivals_summary import Arrivals

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kakehashi.config import AuthorityEndpoint

API = 1
MAX_CLIENTS = 64


@dataclass(frozen=True)
class Opened:
    """A session that the authority has opened.

    ``ticket`` is good for one grant; ``ends_at`` is ISO 8601 with ``Z``.
    """

    session: str
    ticket: Secret
    ends_at: str


class Authority:
    """The authority's calls.

    Every method raises :class:`RefusedError` with the authority's code where it refuses, and
    :class:`StoreError` where it gives no answer that can be understood.

    Parameters
    ----------
    url : str
        Base address.
    token : Secret
        The hub's credential.
    ca_file : str or None
        Certificate authority of its TLS certificate, where the system does not know it.
    timeout_s : float
        Seconds until a call counts as unanswered.
    """

    def __init__(self, url: str, token: Secret, ca_file: str | None, timeout_s: float) -> None:
        self._url = url
        self._token = token
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context(cafile=ca_file) if url[:6] == "https:" else None
        self._http: SimpleAsyncHTTPClient | None = None

    @classmethod
    def from_config(cls, endpoint: AuthorityEndpoint) -> Authority:
        """Make a client from the configuration, reading the credential's file."""
        ca_file = None if endpoint.ca_file is None else str(endpoint.ca_file)
        return cls(endpoint.url, read_secret(endpoint.token_file), ca_file, endpoint.timeout_s)

    async def version(self) -> str:
        """Return the store's software version, after checking that it speaks our interface."""
        answer = await self._call("GET", "/v1/version")
        if answer.get("api") != API:
            raise RefusedError(
                "version",
                f"the store speaks interface {answer.get('api')!r} and this hub {API}; "
                "install the same Kakehashi on both",
            )
        return _text(answer, "software")

    async def projects(self, groups: Iterable[str]) -> list[dict[str, Any]]:
        """Return the projects of these groups that have not expired."""
        answer = await self._call("POST", "/v1/projects", {"groups": sorted(groups)})
        projects = answer.get("projects")
        if not isinstance(projects, list) or not all(isinstance(item, dict) for item in projects):
            raise StoreError("the store's authority gave no list of projects")
        return projects

    async def open_session(
        self,
        *,
        person: str,
        groups: Iterable[str],
        project: str,
        site: str,
        hours: float,
        software: str,
    ) -> Opened:
        """Open an interactive session and get the ticket for it."""
        answer = await self._call(
            "POST",
            "/v1/sessions",
            {
                "person": person,
                "groups": sorted(groups),
                "project": project,
                "site": site,
                "kind": "interactive",
                "hours": hours,
                "software": software,
            },
        )
        return Opened(
            _text(answer, "session"), Secret(_text(answer, "ticket")), _text(answer, "ends_at")
        )

    async def grant(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Redeem a ticket."""
        return await self._call("POST", "/v1/grants", request)

    async def lease(self, session: str, message: str, signature: str) -> dict[str, Any]:
        """Renew a lease on the node's signed word."""
        return await self._call(
            "POST",
            "/v1/leases",
            {"session": session, "message": message, "signature": signature},
        )

    async def report(self, session: str, message: str, signature: str) -> None:
        """Hand on what the wrapper says of the end."""
        await self._call(
            "POST",
            f"/v1/sessions/{session}/report",
            {"witness": "wrapper", "message": message, "signature": signature},
        )

    async def announce_end(self, session: str, reason: str, grace_s: float) -> None:
        """Have the store end a session after a grace, whatever comes."""
        await self._call(
            "POST", f"/v1/sessions/{session}/ending", {"reason": reason, "grace_s": grace_s}
        )

    async def ended(self, sessions: Iterable[str]) -> dict[str, str]:
        """Return those of these sessions that the store has ended, with its reasons."""
        answer = await self._call("POST", "/v1/sessions/states", {"sessions": sorted(sessions)})
        states = answer.get("states")
        if not isinstance(states, dict):
            raise StoreError("the store's authority gave no states of sessions")
        return {
            name: str(state.get("reason"))
            for name, state in states.items()
            if isinstance(state, dict) and state.get("state") == "ended"
        }

    async def witness(self, site: str, message: str, signature: str) -> dict[str, Any]:
        """Hand on what a site's root says; the store checks its signature."""
        return await self._call(
            "POST", "/v1/witness", {"site": site, "message": message, "signature": signature}
        )

    async def end(self, session: str, reason: str, scheduler: Mapping[str, Any]) -> dict[str, Any]:
        """End a session and return its receipt; a second call gives the same receipt."""
        return await self._call(
            "POST",
            f"/v1/sessions/{session}/end",
            {"reason": reason, "scheduler": dict(scheduler)},
        )

    async def revoke(self, session: str, by: str, reason: str) -> None:
        """Take a session's right away; the store closes its connections."""
        await self._call("POST", f"/v1/sessions/{session}/revoke", {"by": by, "reason": reason})

    async def receipt(self, session: str) -> dict[str, Any]:
        """Return a session's receipt."""
        return await self._call("GET", f"/v1/sessions/{session}/receipt")

    async def arrivals(self) -> Arrivals | None:
        """Return the summary of what hospitals sent; None where the store has none yet."""
        try:
            answer = await self._call("GET", "/v1/arrivals")
        except RefusedError as error:
            if error.code == "not-found":
                return None
            raise
        return Arrivals.parse(json.dumps(answer))

    async def audit(self, kind: str, person: str | None, detail: Mapping[str, Any]) -> None:
        """Have the store write what the hub has to record."""
        await self._call(
            "POST", "/v1/audit", {"kind": kind, "person": person, "detail": dict(detail)}
        )

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        if self._http is None:
            # Made inside the event loop that will use it.
            self._http = SimpleAsyncHTTPClient(force_instance=True, max_clients=MAX_CLIENTS)
        request = HTTPRequest(
            self._url + path,
            method=method,
            headers={
                "Authorization": f"Bearer {self._token.reveal()}",
                "Content-Type": "application/json",
            },
            body=None if body is None else json.dumps(body),
            connect_timeout=self._timeout_s,
            request_timeout=self._timeout_s,
            follow_redirects=False,
            ssl_options=self._tls,
        )
        try:
            response = await self._http.fetch(request, raise_error=False)
        except (OSError, HttpStatusError) as error:
            raise StoreError(f"the store's authority gave no answer: {error}") from None
        if response.code == 599:
            raise StoreError(f"the store's authority gave no answer: {response.reason}")
        try:
            answer = json.loads(response.body or b"null")
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise StoreError(f"the store's authority answered {response.code} without JSON")
        if 400 <= response.code < 500:
            raise RefusedError(
                str(answer.get("error", response.code)), str(answer.get("message", "refused"))
            )
        if response.code != 200:
            raise StoreError(f"the store's authority failed (status {response.code})")
        return answer


def _text(answer: Mapping[str, Any], key: str) -> str:
    value = answer.get(key)
    if not isinstance(value, str):
        raise StoreError(f"the store's authority left out {key!r}")
    return value
