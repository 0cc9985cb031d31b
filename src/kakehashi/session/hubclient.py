"""The calls that a node makes at the portal."""

from __future__ import annotations

import base64
import http.client
import json
import re
import ssl
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from kakehashi.errors import RefusedError, SessionError
from kakehashi.session import keys

if TYPE_CHECKING:
    from kakehashi.secret import Secret

_PREFIX = "/hub/api/kakehashi/"
_ANSWER_LIMIT = 1 << 20
_ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]{0,252}")
_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9][A-Za-z0-9.-]{0,252}):[0-9]{1,5}")
_TOKEN = re.compile(r"[A-Za-z0-9._-]{1,2048}")
_HASH = re.compile(r"[0-9a-f]{64}")
# Two while the store replaces its host CA: the new one, and the one that sshd still shows.
_KEY_LINES = re.compile(r"ssh-[a-z0-9-]+ [A-Za-z0-9+/]+=*(\nssh-[a-z0-9-]+ [A-Za-z0-9+/]+=*)?")
_TOO_MANY, _TIMEOUT = 429, 408


class UnreachableError(SessionError):
    """The portal did not answer, or not with anything that could be an answer of it."""


@dataclass(frozen=True)
class Grant:
    """A lease on a project's view, checked; the fields are those of the contract.

    Its times are those of the store's clock, which need not agree with this node's: only what
    lies between two of them counts here, from when the grant was heard.

    Attributes
    ----------
    catalogue : str or None
        What the store's catalogue service wants to see, as long as the lease is good.
    heard : float
        When the grant came, by this node's monotonic clock.
    """

    session: str
    person: str
    project: str
    serial: int
    issued_at: datetime
    expires_at: datetime
    ends_at: datetime
    certificate: str
    address: str
    further_addresses: tuple[str, ...]
    port: int
    host_ca: str
    view_account: str
    work_account: str
    manifest: dict[str, str]
    catalogue: str | None = field(repr=False)
    software: str
    heard: float

    @property
    def lease_s(self) -> float:
        """Return how long the lease was good when it was given, seconds."""
        return (self.expires_at - self.issued_at).total_seconds()

    @property
    def left_s(self) -> float:
        """Return how long the session may still last, seconds."""
        given = (self.ends_at - self.issued_at).total_seconds()
        return self.heard + given - time.monotonic()

    def by_own_clock(self, moment: datetime) -> datetime:
        """Return what this node's clock shows at a moment of the store's."""
        since = timedelta(seconds=time.monotonic() - self.heard)
        return datetime.now(UTC) - since + (moment - self.issued_at)

    @classmethod
    def parse(cls, value: object, session: str, public: bytes) -> Self:
        """Check what the portal sent.

        Parameters
        ----------
        value : object
            The JSON value.
        session : str
            The session that it must be for.
        public : bytes
            The public key that its certificate must name.

        Raises
        ------
        SessionError
            Names the field that is missing or wrong.
        """
        try:
            grant = cls._read(value)
        except (KeyError, TypeError, ValueError) as error:
            raise SessionError(
                f"the portal's grant is not understood ({type(error).__name__}: {error}); "
                "compare the software versions of portal and node"
            ) from None
        if grant.session != session:
            raise SessionError("the portal's grant is for another session")
        keys.certificate_blob(grant.certificate, public)
        return grant

    @classmethod
    def _read(cls, value: Any) -> Self:
        store, manifest = value["store"], value["manifest"]
        port, further = store["port"], store["further_addresses"]
        if type(port) is not int or not 1 <= port <= 65535:
            raise ValueError("store.port")
        if not isinstance(further, list):
            raise TypeError("store.further_addresses")
        issued_at = parse_time(value["issued_at"])
        expires_at = parse_time(value["expires_at"])
        if expires_at <= issued_at:
            raise ValueError("expires_at is not after issued_at")
        return cls(
            session=str(value["session"]),
            person=str(value["person"]),
            project=str(value["project"]),
            serial=int(value["serial"]),
            issued_at=issued_at,
            expires_at=expires_at,
            ends_at=parse_time(value["ends_at"]),
            certificate=str(value["certificate"]),
            address=_matching(store["address"], _ADDRESS, "store.address"),
            further_addresses=tuple(
                _matching(one, _ADDRESS, "store.further_addresses") for one in further
            ),
            port=port,
            host_ca=_matching(store["host_ca"], _KEY_LINES, "store.host_ca"),
            view_account=_matching(store["view_account"], _ACCOUNT, "store.view_account"),
            work_account=_matching(store["work_account"], _ACCOUNT, "store.work_account"),
            manifest={
                "path": str(manifest["path"]),
                "sha256": _matching(manifest["sha256"], _HASH, "manifest.sha256"),
            },
            catalogue=None
            if value.get("catalogue") is None
            else _matching(value["catalogue"], _TOKEN, "catalogue"),
            software=str(value["software"]),
            heard=time.monotonic(),
        )


@dataclass(frozen=True)
class Enrolment:
    """What a redeemed ticket gives."""

    grant: Grant
    argv: tuple[str, ...]
    environment: dict[str, str]
    files: dict[str, str]
    hub_address: str
    hub_port: int
    offline_max_s: float


def parse_time(text: str) -> datetime:
    """Return a time given as ISO 8601 with ``Z``."""
    if not text.endswith("Z"):
        raise ValueError(f"{text!r} is not a time in UTC")
    return datetime.fromisoformat(text)


def format_time(moment: datetime) -> str:
    """Return a time as ISO 8601 with ``Z``, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _matching(value: object, pattern: re.Pattern[str], name: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(name)
    return value


class HubClient:
    """Speaks to ``PORTAL/hub/api/kakehashi/``.

    Parameters
    ----------
    url : str
        The portal's address; TLS unless it is the loopback address.
    authority : str or None
        PEM text of the certificates that may have signed the portal's; the node's own list
        by default.
    session : str
    """

    def __init__(self, url: str, authority: str | None, session: str) -> None:
        self._parts = urlsplit(url)
        self._session = session
        self._context: ssl.SSLContext | None = None
        if self._parts.scheme == "https":
            try:
                self._context = ssl.create_default_context(cadata=authority)
            except ssl.SSLError as error:
                raise SessionError(
                    f"portal_ca: is not a PEM certificate ({error.reason})"
                ) from None

    def enrol(self, ticket: Secret, key: keys.SigningKey, facts: dict[str, Any]) -> Enrolment:
        """Redeem the ticket.

        Raises
        ------
        RefusedError
            The portal says no.
        SessionError
            It cannot be reached, or its answer is not understood. A ticket that may have
            arrived is not sent again: a second redemption counts as theft.
        """
        body = {
            "session": self._session,
            "ticket": ticket.reveal(),
            "public_key": keys.public_line(key.public),
        }
        value = self._post("enrol", body | facts, timeout=60)
        grant = Grant.parse(value.get("grant"), self._session, key.public)
        try:
            server, hub = value["server"], value["hub"]
            return Enrolment(
                grant=grant,
                argv=_texts(server["argv"]),
                environment=_text_map(server["environment"]),
                files=_text_map(server["files"]),
                hub_address=_matching(hub["address"], _ENDPOINT, "hub.address"),
                hub_port=int(hub["port"]),
                offline_max_s=float(value["offline_max_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SessionError(
                f"the portal's answer is not understood ({type(error).__name__}: {error}); "
                "compare the software versions of portal and node"
            ) from None

    def refuse(self, ticket: Secret, failures: list[dict[str, str]]) -> None:
        """Say why this node cannot start the session; spends the ticket."""
        body = {"session": self._session, "ticket": ticket.reveal(), "failures": failures}
        self._post("refuse", body, timeout=20)

    def renew(self, key: keys.SigningKey, counter: int) -> Grant:
        """Have the lease renewed for the same key.

        Raises
        ------
        RefusedError
            The right is lost.
        UnreachableError
            No answer; to be tried again.
        """
        message = {"renew": self._session, "counter": counter}
        value = self._post("renew", self._signed(key, message), timeout=20)
        return Grant.parse(value, self._session, key.public)

    def leave(self, key: keys.SigningKey, items: list[dict[str, str]]) -> None:
        """Hand in the report at the session's end."""
        message = {"report": self._session, "items": items}
        self._post("leave", self._signed(key, message), timeout=5)

    def testify(self, site: str, key: keys.SigningKey, message: dict[str, Any]) -> dict[str, Any]:
        """Hand in what a site's root says, signed with the site's own key."""
        text = json.dumps(message)
        signature = base64.b64encode(key.sign(text.encode())).decode()
        body = {"site": site, "message": text, "signature": signature}
        return self._post("witness", body, timeout=5)

    def _signed(self, key: keys.SigningKey, message: dict[str, Any]) -> dict[str, str]:
        text = json.dumps(message)
        signature = base64.b64encode(key.sign(text.encode())).decode()
        return {"session": self._session, "message": text, "signature": signature}

    def _post(self, call: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        connection = self._connect(timeout)
        path = f"{self._parts.path.rstrip('/')}{_PREFIX}{call}"
        try:
            connection.request(
                "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            status, data = response.status, response.read(_ANSWER_LIMIT)
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"the portal at {self._parts.netloc} does not answer to {call} "
                f"({type(error).__name__}: {error})"
            ) from None
        finally:
            connection.close()
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if status == http.client.OK and isinstance(value, dict):
            return value
        given = value if isinstance(value, dict) else {}
        code = given.get("error")
        # Without a word of the hub's own, "not found" is its proxy's while there is no hub.
        nobody = status == http.client.NOT_FOUND and not isinstance(code, str)
        if status < 400 or status >= 500 or status in {_TOO_MANY, _TIMEOUT} or nobody:
            raise UnreachableError(f"the portal answered {status} to {call}")
        message = given.get("message")
        raise RefusedError(
            code if isinstance(code, str) else f"http-{status}",
            message if isinstance(message, str) else f"the portal answered {status} to {call}",
        )

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._context is not None:
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=self._context)
        return http.client.HTTPConnection(host, port, timeout=timeout)


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise TypeError("expected a list of texts")
    return tuple(value)


def _text_map(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(
        isinstance(item, str) for pair in value.items() for item in pair
    ):
        raise TypeError("expected an object of texts")
    return value
