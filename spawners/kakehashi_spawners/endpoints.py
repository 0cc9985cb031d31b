"""The hub's own addresses: those that nodes call, and two for the spawn page and receipts.

Nodes carry no person's token. What authorises them is the ticket or the signature of the
session's key, the site's address, and the scheduler's word that the job runs.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import hmac
import ipaddress
import json
import ssl
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import batchspawner.api
from jupyterhub.apihandlers import APIHandler, default_handlers
from jupyterhub.user import User
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tornado import web

from kakehashi.errors import KakehashiError, RefusedError, StoreError
from kakehashi_spawners import server
from kakehashi_spawners.portal import current

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kakehashi_spawners.portal import Portal
    from kakehashi_spawners.spawner import KakehashiSpawner, Session

MAX_BODY = 64 * 1024
# Refused requests a minute from one address, for each session and for all that are unknown.
MAX_REFUSED = 20
REFUSED_WINDOW_S = 60.0
REMEMBERED = 4096
SUBMITTED_WAIT_S = 20.0
RUNNING_WAIT_S = 15.0
STATUS = {
    "address": 403,
    "ended": 410,
    "job-not-running": 403,
    "limit": 429,
    "malformed": 422,
    "no-receipt": 404,
    "replayed": 409,
    "session": 404,
    "unknown-job": 404,
    "unknown-session": 404,
    "silent": 503,
}

SessionId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Ticket = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{43}=?$", repr=False)]
Signature = Annotated[str, Field(pattern="^[A-Za-z0-9+/]{86}==$")]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    session: SessionId


class Enrolment(_Body):
    """A node asks for its grant and for the person's server."""

    ticket: Ticket
    public_key: str = Field(pattern="^ssh-ed25519 [A-Za-z0-9+/]{68}$")
    port: int = Field(ge=1024, le=65535)
    walls: Literal["namespaces", "account"]
    hub_port: int | None = Field(ge=1024, le=65535)
    host: str = Field(pattern="^[A-Za-z0-9]([A-Za-z0-9.:-]{0,252})$")
    job: str = Field(pattern="^[A-Za-z0-9._-]{1,64}$")
    software: str = Field(pattern="^[A-Za-z0-9.+-]{1,64}$")
    checks: list[dict[str, Any]] = Field(max_length=64)


class Failure(BaseModel):
    """One check of a node that failed, in words."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    check: str = Field(max_length=64)
    message: str = Field(max_length=1000)


class Refusal(_Body):
    """A node says why it cannot start."""

    ticket: Ticket
    failures: list[Failure] = Field(min_length=1, max_length=64)


class Signed(_Body):
    """A message signed with the session's key."""

    message: str = Field(max_length=32 * 1024)
    signature: Signature


class Testimony(BaseModel):
    """A message signed by a site's root."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: str = Field(pattern="^[a-z][a-z0-9-]{0,31}$")
    message: str = Field(max_length=32 * 1024)
    signature: Signature


class Refusals:
    """Counts refused requests, so that nobody can guess or flood."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, deque[float]] = OrderedDict()

    def add(self, key: str) -> None:
        """Note one."""
        # Bounded: what is remembered of a flood, and gone through at each request, stays small.
        self._seen.setdefault(key, deque(maxlen=MAX_REFUSED)).append(time.monotonic())
        self._seen.move_to_end(key)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def check(self, key: str) -> None:
        """Refuse to go on after too many.

        Raises
        ------
        RefusedError
            With code ``limit``.
        """
        since = time.monotonic() - REFUSED_WINDOW_S
        if sum(moment > since for moment in self._seen.get(key, ())) >= MAX_REFUSED:
            raise RefusedError("limit", "too many refused requests; wait a minute")


def source_address(request: Any, proxy_certificate: bytes | None) -> str:
    """Return the address that a request came from.

    Only our own proxy, known by its TLS certificate, is believed about other addresses, and of
    what it passes on only the last one: that it has added itself. JupyterHub's own reckoning
    also believes ``X-Real-Ip``, which anybody can send.

    Parameters
    ----------
    request : tornado.httputil.HTTPServerRequest
        The request.
    proxy_certificate : bytes or None
        The proxy's certificate, DER.
    """
    stream = request.connection.stream
    peer: str = stream.socket.getpeername()[0]
    shown = stream.socket.getpeercert(binary_form=True) if _is_tls(stream.socket) else None
    if proxy_certificate is None or shown != proxy_certificate:
        return peer
    passed = request.headers.get_list("X-Forwarded-For")
    return passed[-1].split(",")[-1].strip() if passed else peer


def _is_tls(socket: Any) -> bool:
    return isinstance(socket, ssl.SSLSocket)


class QuietHandler(APIHandler):  # type: ignore[misc]  # jupyterhub has no types
    """JSON errors in the contract's form."""

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Write ``{"error": CODE, "message": TEXT}``."""
        error = (kwargs.get("exc_info") or (None, None))[1]
        code, message = "error", "the request failed"
        if isinstance(error, RefusedError):
            code, message = error.code, str(error)
        elif isinstance(error, StoreError):
            code, message = "silent", str(error)
        elif isinstance(error, web.HTTPError):
            code = {403: "forbidden", 404: "not-found"}.get(status_code, "error")
            message = error.log_message or message
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"error": code, "message": message}))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Leave expected refusals out of the log's tracebacks."""
        if not isinstance(value, KakehashiError):
            super().log_exception(typ, value, tb)

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Give each refusal its status."""
        error = (kwargs.get("exc_info") or (None, None))[1]
        if isinstance(error, RefusedError):
            status_code = STATUS.get(error.code, 403)
        elif isinstance(error, KakehashiError):
            status_code = 503
        super().send_error(status_code, **kwargs)


@web.stream_request_body
class NodeHandler(QuietHandler):
    """What the four calls of a node have in common."""

    # No cookie and no token: a person's rights are not what decides here.
    _accept_cookie_auth = False
    _accept_token_auth = False
    refusals: ClassVar[Refusals] = Refusals()

    async def prepare(self) -> None:
        """Bound the body before it is read."""
        self._chunks: list[bytes] = []
        self.request.connection.set_max_body_size(MAX_BODY)
        await super().prepare()

    def data_received(self, chunk: bytes) -> None:
        """Collect the body."""
        self._chunks.append(chunk)

    async def post(self) -> None:
        """Answer a node's call; every refusal is counted and recorded."""
        portal = current()
        address = source_address(self.request, proxy_certificate_of(portal))
        spawner: KakehashiSpawner | None = None
        identifier = "?"
        try:
            body = self._parse(address)
            identifier = body.session
            spawner = portal.sessions.get(identifier)
            self.refusals.check(_key(spawner, identifier, address))
            check_address(portal, session_of(spawner), address)
            answer = await self.answer(portal, portal.sessions[identifier], body, address)
        except RefusedError as error:
            if error.code != "limit":
                self.refusals.add(_key(spawner, identifier, address))
                portal.record(
                    f"{self.name}-refused",
                    None if spawner is None else spawner.user.name,
                    {
                        "session": identifier,
                        "code": error.code,
                        "address": address,
                        "words": str(error)[:300],
                    },
                )
            raise
        self.finish(json.dumps(answer))

    name: ClassVar[str]
    model: ClassVar[type[BaseModel]]

    async def answer(
        self, portal: Portal, spawner: KakehashiSpawner, body: Any, address: str
    ) -> dict[str, Any]:
        """Answer a request that came from the session's site."""
        raise NotImplementedError

    def _parse(self, address: str) -> Any:
        try:
            return self.model.model_validate_json(b"".join(self._chunks))
        except ValidationError as error:
            # Rubbish needs no session's name, and each refusal is a record at the store.
            self.refusals.check(_key(None, "?", address))
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in problem["loc"]) or "(body)"
            raise RefusedError("malformed", f"{where[:80]}: {problem['msg']}") from None


def _key(spawner: KakehashiSpawner | None, identifier: str, address: str) -> str:
    # Also by address where the session is known: who merely knows its name, elsewhere, must not
    # keep its keeper from renewing the lease.
    return f"address {address}" if spawner is None else f"session {identifier} from {address}"


def check_address(portal: Portal, session: Session, address: str) -> None:
    """Check that a request comes from the session's site.

    Raises
    ------
    RefusedError
        ``address``: it does not.
    """
    _check_site_address(portal, session.site, address)


def _check_site_address(portal: Portal, name: str, address: str) -> None:
    site = portal.config.sites.get(name)
    networks = () if site is None else site.addresses
    try:
        source = ipaddress.ip_address(address)
    except ValueError:
        source = None
    if source is None or not any(source in ipaddress.ip_network(one) for one in networks):
        raise RefusedError("address", f"{address} is no address of the site")


def _check_ticket(session: Session, ticket: str) -> None:
    shown = hashlib.sha256(ticket.encode()).hexdigest()
    if not hmac.compare_digest(shown, session.ticket_sha256):
        raise RefusedError("ticket", "this is not the session's ticket")


class EnrolHandler(NodeHandler):
    """``POST enrol``: the ticket for a grant and the person's server."""

    name = "enrol"
    model = Enrolment

    async def answer(
        self, portal: Portal, spawner: KakehashiSpawner, body: Enrolment, address: str
    ) -> dict[str, Any]:
        """Check everything the hub can see, redeem the ticket, describe the server."""
        session = session_of(spawner)
        _check_ticket(session, body.ticket)
        if body.software != portal.software:
            words = (
                f"the node has Kakehashi {body.software} and this hub {portal.software}; "
                "install the same version on both"
            )
            spawner.fail(words)
            raise RefusedError("version", words)
        site = portal.config.sites[session.site]
        if body.walls != site.node.walls or (body.walls == "account") != bool(body.hub_port):
            words = (
                f"the node keeps its sessions by {body.walls}, and this hub's configuration says "
                f"{site.node.walls} (sites.{session.site}.node.walls); make them agree"
            )
            spawner.fail(words)
            raise RefusedError("walls", words)
        # A ticket that was used already goes straight to the store: it raises the alarm.
        host = "" if session.enrolled else await _running_host(portal, spawner, body, address)
        try:
            grant = await portal.authority.grant(
                {
                    "session": body.session,
                    "ticket": body.ticket,
                    "public_key": body.public_key,
                    "host": body.host,
                    "address": address,
                    "job": body.job,
                    "walls": body.walls,
                    "software": body.software,
                }
            )
        except RefusedError as error:
            spawner.fail(f"the store refused: {error}")
            if error.code == "replayed":
                spawner.lose_right("its ticket was used a second time")
            raise
        session = session_of(spawner)
        inside = body.hub_port or server.hub_port(portal.settings.hub_port, body.port)
        places = server.places(site.node, session.session)
        environment = spawner.enrol(host, body.port, inside, places, grant)
        until = _moment(session_of(spawner).ends_at)
        key, certificate = await asyncio.to_thread(
            portal.issuer.issue, session.session, [host], until
        )
        bundle = spawner.internal_trust_bundles["notebooks-ca"]
        return {
            "grant": grant,
            "server": server.describe(
                node=site.node,
                places=places,
                person=spawner.user.name,
                environment=environment,
                key=key,
                certificate=certificate,
                authorities=await asyncio.to_thread(_read, bundle),
            ),
            "hub": {
                "address": portal.hub_address(session.site),
                "port": inside,
            },
            "offline_max_s": round(site.offline_max_hours * 3600),
        }


async def _running_host(
    portal: Portal, spawner: KakehashiSpawner, body: Enrolment, address: str
) -> str:
    """Ask the scheduler whether the job runs there, and say where the proxy reaches it."""
    submitted = spawner.submitted
    if submitted is None:
        raise RefusedError("session", "the session is not starting")
    # A quick job comes before the agent has told its id.
    await asyncio.wait([submitted], timeout=SUBMITTED_WAIT_S)
    if not submitted.done() or submitted.exception() or submitted.result() != body.job:
        raise RefusedError("job-not-running", f"the session's job is not {body.job!r}")
    # The node's ticket is sent once, so a scheduler that hesitates is asked again here.
    deadline = time.monotonic() + RUNNING_WAIT_S
    state = await spawner.query_job_status()
    while state.state in {"pending", "unknown"} and time.monotonic() < deadline:
        await asyncio.sleep(0.25)
        state = await spawner.query_job_status()
    if state.state == "unknown":
        raise RefusedError("silent", "the scheduler does not answer; try again")
    if state.state != "running" or not state.hosts:
        raise RefusedError("job-not-running", f"the scheduler says that the job is {state.state}")
    loopback = [host for host in state.hosts if _is_loopback(host)]
    if loopback:
        # A site without a scheduler: the job is a process beside the hub itself.
        return loopback[0]
    named = [host for host in state.hosts if _short(host) == _short(body.host)]
    if not named:
        raise RefusedError("job-not-running", f"the job does not run on {body.host}")
    return (
        named[0] if portal.config.sites[session_of(spawner).site].node_name_is_address else address
    )


def session_of(spawner: KakehashiSpawner | None) -> Session:
    """Return a spawner's session.

    Raises
    ------
    RefusedError
        ``session``: there is none.
    """
    if spawner is None or spawner.session is None:
        raise RefusedError("session", "this hub has no such session; it may have ended")
    return spawner.session


def _short(host: str) -> str:
    return host.partition(".")[0].lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _moment(text: str) -> dt.datetime:
    moment = dt.datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def _read(path: str) -> str:
    return Path(path).read_text(encoding="ascii")


class RefuseHandler(NodeHandler):
    """``POST refuse``: the node says why it cannot start."""

    name = "refuse"
    model = Refusal

    async def answer(
        self,
        portal: Portal,
        spawner: KakehashiSpawner,
        body: Refusal,
        address: str,  # noqa: ARG002 - checked before, for every call alike
    ) -> dict[str, Any]:
        """Show the node's words to the person; ending the session spends the ticket."""
        session = session_of(spawner)
        _check_ticket(session, body.ticket)
        if session.enrolled:
            raise RefusedError("replayed", "the session has enrolled already")
        words = "; ".join(f"{one.check}: {one.message}" for one in body.failures)
        portal.record(
            "node-cannot-start",
            spawner.user.name,
            {"session": session.session, "site": session.site, "words": words[:2000]},
        )
        spawner.fail(f"the node cannot start a session: {words}")
        return {}


class RenewHandler(NodeHandler):
    """``POST renew``: a new certificate for the same key."""

    name = "renew"
    model = Signed

    async def answer(
        self,
        portal: Portal,
        spawner: KakehashiSpawner,
        body: Signed,
        address: str,  # noqa: ARG002 - checked before, for every call alike
    ) -> dict[str, Any]:
        """Hand the signed word to the store, which checks it."""
        grant = await portal.authority.lease(body.session, body.message, body.signature)
        spawner.renewed(grant)
        return grant


class LeaveHandler(NodeHandler):
    """``POST leave``: what the wrapper saw at the end."""

    name = "leave"
    model = Signed

    async def answer(
        self,
        portal: Portal,
        spawner: KakehashiSpawner,
        body: Signed,
        address: str,  # noqa: ARG002 - checked before, for every call alike
    ) -> dict[str, Any]:
        """Hand the signed report to the store, and look at the job soon."""
        await portal.authority.report(body.session, body.message, body.signature)
        spawner.left()
        return {}


class WitnessHandler(NodeHandler):
    """``POST witness``: a site's root reports of a node, or asks where it has to look."""

    name = "witness"
    model = Testimony

    async def post(self) -> None:
        """Hand the signed word to the store, which alone can tell whose it is."""
        portal = current()
        address = source_address(self.request, proxy_certificate_of(portal))
        key = f"address {address}"
        site = "?"
        try:
            self.refusals.check(key)
            said = self._parse(address)
            site = said.site
            _check_site_address(portal, site, address)
            answer = await portal.authority.witness(site, said.message, said.signature)
        except RefusedError as error:
            # After a job of another kind than ours, root is right to ask, and gets a no.
            if error.code not in {"limit", "unknown-job"}:
                self.refusals.add(key)
                about = {"site": site, "code": error.code, "address": address}
                portal.record("witness-refused", None, about)
            raise
        self.finish(json.dumps(answer))


class SitesHandler(QuietHandler):
    """``GET sites``: what the person may choose, with free GPUs as they are now."""

    async def get(self) -> None:
        """Answer the choices."""
        _own(self)
        user = self.current_user
        choices = await current().choices(user.name, [group.name for group in user.groups])
        self.finish(json.dumps(choices))


class ReceiptHandler(QuietHandler):
    """``GET receipts/SESSION``: for whose session it was, and the portal's operators."""

    async def get(self, session: str) -> None:
        """Answer the receipt."""
        _own(self)
        receipt = await current().authority.receipt(session)
        user = self.current_user
        if receipt.get("person") != user.name and not self.has_scope("admin-ui"):
            # As for a session that never was.
            raise RefusedError("session", "there is no such receipt")
        self.finish(json.dumps(receipt))


def _own(handler: APIHandler) -> None:
    """Let in a person, by cookie or own token, and not what runs inside a session."""
    user = handler.current_user
    if not isinstance(user, User) or not handler.has_scope(f"servers!user={user.name}"):
        raise web.HTTPError(403, "this needs the rights of a person")


class RetiredHandler(QuietHandler):
    """Where batchspawner let any server's token set any attribute of its spawner."""

    refusals: ClassVar[Refusals] = Refusals()

    def post(self) -> None:
        """Refuse, and record who tried."""
        address = source_address(self.request, proxy_certificate_of(current()))
        self.refusals.check(address)
        self.refusals.add(address)
        person = getattr(self.current_user, "name", None)
        current().record("attack", person, {"on": "/api/batchspawner", "address": address})
        raise web.HTTPError(404, "there is nothing here")


def proxy_certificate_of(portal: Portal) -> bytes | None:
    """Return the proxy's certificate, DER, None before there is one."""
    try:
        pem = portal.proxy_certificate.read_text(encoding="ascii")
    except OSError:
        return None
    return ssl.PEM_cert_to_DER_cert(pem)


HANDLERS = [
    (r"/api/batchspawner", RetiredHandler),
    (r"/api/kakehashi/enrol", EnrolHandler),
    (r"/api/kakehashi/refuse", RefuseHandler),
    (r"/api/kakehashi/renew", RenewHandler),
    (r"/api/kakehashi/leave", LeaveHandler),
    (r"/api/kakehashi/witness", WitnessHandler),
    (r"/api/kakehashi/sites", SitesHandler),
    (r"/api/kakehashi/receipts/([0-9a-f]{32})", ReceiptHandler),
]


def install(handlers: Sequence[tuple[str, type[QuietHandler]]]) -> None:
    """Put addresses in place, and batchspawner's out of it.

    Importing batchspawner registers an endpoint that sets any attribute of a spawner, such as
    the command that the hub runs, for whoever holds the token of a server.
    """
    default_handlers[:] = [
        entry
        for entry in default_handlers
        if entry not in handlers
        and not issubclass(entry[1], batchspawner.api.BatchSpawnerAPIHandler)
    ] + list(handlers)


install(HANDLERS)
