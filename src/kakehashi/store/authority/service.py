"""The authority's HTTPS interface for hubs (the contract is in docs/architecture.md)."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from kakehashi import __version__
from kakehashi.config import Config, StoreHost
from kakehashi.errors import ConfigError, RefusedError
from kakehashi.secret import Secret
from kakehashi.store.authority import hubs
from kakehashi.store.authority.authority import Authority, explain
from kakehashi.store.authority.layout import Layout
from kakehashi.store.authority.models import (
    MAX_BODY,
    AuditRequest,
    EndingRequest,
    EndRequest,
    GrantRequest,
    LeaseRequest,
    ProjectsRequest,
    RevokeRequest,
    SessionRequest,
    StatesRequest,
    WitnessRequest,
    WrapperReport,
)

if TYPE_CHECKING:
    from collections.abc import Callable

API_VERSION = 1
END_PATIENCE_S = 4.0
"""Seconds that the end of a session waits for its connections to close."""

SWEEP_S = 1.0
WATCH_S = 0.5
ANCHOR_S = 10.0
_POLL_S = 0.05

_STATUS = {
    "credential": 401,
    "unknown-session": 404,
    "no-receipt": 404,
    "unknown-job": 404,
    "not-found": 404,
    "replayed": 409,
    "ended": 410,
    "malformed": 422,
    "limit": 429,
}
"""HTTP status of each code; every other refusal is 403."""

_log = logging.getLogger("kakehashi.authority")
_Model = TypeVar("_Model", bound=BaseModel)


class _Anchoring:
    """Writes anchors on a thread of its own: their storage may hang, and the store must not."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="anchor")
        self._queued = False

    def soon(self) -> None:
        """Ask for the head to be anchored."""
        if not self._queued:
            self._queued = True
            self._pool.submit(self._write)

    def close(self) -> None:
        """Let go of the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(self) -> None:
        self._queued = False
        try:
            self._authority.anchor()
        except Exception:
            _log.exception("the audit head could not be anchored")


class _Handler(RequestHandler):
    def initialize(self, authority: Authority, layout: Layout, anchoring: _Anchoring) -> None:
        self.authority = authority
        self.layout = layout
        self.anchoring = anchoring
        self.hub = ""

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")

    def prepare(self) -> None:
        scheme, _, token = self.request.headers.get("Authorization", "").partition(" ")
        hub = None
        if scheme == "Bearer" and 0 < len(token) <= 256 and token.isascii():
            hub = hubs.identify(self.layout.hubs, Secret(token))
        if hub is None:
            raise RefusedError(
                "credential",
                "this is not the credential of a hub; `kakehashi store hub-add` makes one",
            )
        self.hub = hub

    def body(self, model: type[_Model]) -> _Model:
        try:
            return model.model_validate_json(self.request.body)
        except ValidationError as error:
            self.authority.note_malformed(self.hub, self.request.path)
            raise RefusedError("malformed", explain(error)) from None

    def answer(self, document: dict[str, Any]) -> None:
        self.write(json.dumps(document, ensure_ascii=False))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if isinstance(value, RefusedError):
            _log.info("%s %s: %s", self.request.method, self.request.path, value.code)
        else:
            # Tornado would print the whole request, its credential included.
            _log.error(
                "%s %s failed", self.request.method, self.request.path, exc_info=(typ, value, tb)
            )

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, RefusedError):
            self.set_status(_STATUS.get(error.code, 403))
            self.answer({"error": error.code, "message": str(error)})
        elif status_code == 405:
            self.answer({"error": "method", "message": "this address does not know that method"})
        else:
            self.answer({"error": "internal", "message": "the authority failed; its log says why"})


class _Version(_Handler):
    def get(self) -> None:
        self.answer({"software": __version__, "api": API_VERSION})


class _Projects(_Handler):
    def post(self) -> None:
        request = self.body(ProjectsRequest)
        self.answer({"projects": self.authority.projects(request.groups)})


class _Sessions(_Handler):
    def post(self) -> None:
        self.answer(self.authority.create(self.hub, self.body(SessionRequest)))


class _Grants(_Handler):
    def post(self) -> None:
        self.answer(self.authority.grant(self.hub, self.body(GrantRequest)))


class _Leases(_Handler):
    def post(self) -> None:
        request = self.body(LeaseRequest)
        self.answer(
            self.authority.renew(self.hub, request.session, request.message, request.signature)
        )


class _Report(_Handler):
    def post(self, session: str) -> None:
        report = self.body(WrapperReport)
        self.authority.report_wrapper(self.hub, session, report.message, report.signature)
        self.answer({})


class _Witness(_Handler):
    def post(self) -> None:
        said = self.body(WitnessRequest)
        self.answer(self.authority.witness(self.hub, said.site, said.message, said.signature))


class _States(_Handler):
    def post(self) -> None:
        asked = self.body(StatesRequest)
        self.answer({"states": self.authority.states(self.hub, asked.sessions)})


class _Ending(_Handler):
    def post(self, session: str) -> None:
        request = self.body(EndingRequest)
        self.authority.announce_end(self.hub, session, request.reason, request.grace_s)
        self.answer({})


class _End(_Handler):
    async def post(self, session: str) -> None:
        request = self.body(EndRequest)
        self.authority.end(self.hub, session, request.reason, request.scheduler)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + END_PATIENCE_S
        # The guard, another process, notes their closing in the book: there is no event of it.
        while self.authority.connections_left(session) and loop.time() < deadline:  # noqa: ASYNC110 - no event
            await asyncio.sleep(_POLL_S)
        self.answer(self.authority.write_receipt(session))
        self.anchoring.soon()


class _Revoke(_Handler):
    def post(self, session: str) -> None:
        request = self.body(RevokeRequest)
        self.authority.revoke(self.hub, session, request.by, request.reason)
        self.answer({})


class _Receipt(_Handler):
    def get(self, session: str) -> None:
        receipt = self.authority.receipt(self.hub, session)
        if receipt is None:
            raise RefusedError("no-receipt", "the session has no receipt yet")
        self.answer(receipt)


class _Audit(_Handler):
    def post(self) -> None:
        request = self.body(AuditRequest)
        seq = self.authority.record(self.hub, request.kind, request.person, request.detail)
        self.answer({"seq": seq})


class _Arrivals(_Handler):
    def get(self) -> None:
        self.answer(self.authority.arrivals())


class _Nowhere(_Handler):
    def prepare(self) -> None:
        super().prepare()
        raise RefusedError("not-found", "there is nothing at this address")


def application(authority: Authority, layout: Layout, anchoring: _Anchoring) -> Application:
    """Return the web application."""
    parts = {"authority": authority, "layout": layout, "anchoring": anchoring}
    session = r"/v1/sessions/([0-9a-f]{32})"
    return Application(
        [
            (r"/v1/version", _Version, parts),
            (r"/v1/projects", _Projects, parts),
            (r"/v1/sessions", _Sessions, parts),
            (r"/v1/grants", _Grants, parts),
            (r"/v1/leases", _Leases, parts),
            (rf"{session}/report", _Report, parts),
            (r"/v1/sessions/states", _States, parts),
            (r"/v1/witness", _Witness, parts),
            (rf"{session}/ending", _Ending, parts),
            (rf"{session}/end", _End, parts),
            (rf"{session}/revoke", _Revoke, parts),
            (rf"{session}/receipt", _Receipt, parts),
            (r"/v1/audit", _Audit, parts),
            (r"/v1/arrivals", _Arrivals, parts),
        ],
        default_handler_class=_Nowhere,
        default_handler_args=parts,
    )


def tls(store: StoreHost) -> ssl.SSLContext | None:
    """Return the TLS context, or ``None`` where the authority may go without.

    Raises
    ------
    ConfigError
        It would listen on a network without TLS, or its key cannot be used.
    """
    if store.authority_tls_key is None or store.authority_tls_cert is None:
        if not ip_address(store.authority_bind).is_loopback:
            raise ConfigError(
                f"store.authority_bind is {store.authority_bind}: without authority_tls_key and "
                "authority_tls_cert the authority listens on the loopback address only"
            )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(store.authority_tls_cert, store.authority_tls_key)
    except OSError as error:
        raise ConfigError(
            f"{store.authority_tls_key}: the authority's account cannot use this TLS key with "
            f"{store.authority_tls_cert} ({error.strerror or 'they do not fit'}); it must be able "
            "to read both"
        ) from None
    return context


async def _repeat(seconds: float, step: Callable[[], None]) -> None:
    while True:
        try:
            step()
        except Exception:
            _log.exception("a regular task failed; it is tried again")
        await asyncio.sleep(seconds)


async def run(config: Config) -> None:
    """Serve until SIGTERM."""
    store = config.need_store()
    layout = Layout(store.root)
    context = tls(store)
    authority = Authority(config)
    anchoring = _Anchoring(authority)
    watch = authority.sshd_watch()
    server = HTTPServer(
        application(authority, layout, anchoring),
        ssl_options=context,
        max_body_size=MAX_BODY,
        max_header_size=16 * 1024,
        idle_connection_timeout=60,
        body_timeout=30,
    )
    server.add_sockets(bind_sockets(store.authority_port, store.authority_bind))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tasks = [
        asyncio.create_task(_repeat(SWEEP_S, lambda: authority.sweep(END_PATIENCE_S))),
        asyncio.create_task(_repeat(WATCH_S, watch.look)),
        asyncio.create_task(_repeat(ANCHOR_S, anchoring.soon)),
    ]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await stop.wait()
    for task in tasks:
        task.cancel()
    server.stop()
    anchoring.close()
    watch.close()
    authority.close()


def main() -> None:
    """Serve; the configuration comes on standard input."""
    config = Config.model_validate_json(sys.stdin.buffer.read())
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        asyncio.run(run(config))
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
