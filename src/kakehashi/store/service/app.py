"""The service over HTTP: who asks is checked before anything else; no answer may be kept."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

from tornado.httpserver import HTTPServer
from tornado.web import Application, HTTPError, RequestHandler

from kakehashi.errors import RefusedError
from kakehashi.secret import Secret
from kakehashi.store.service.access import as_json
from kakehashi.store.service.call import Call
from kakehashi.store.service.models import MAX_BODY
from kakehashi.store.service.routes import JSON, ROUTES, Route
from kakehashi.store.service.tokens import LONGEST_TOKEN
from kakehashi.store.service.work import CalledOffError

if TYPE_CHECKING:
    import ssl

    from kakehashi.store.service.parts import Parts
    from kakehashi.store.service.tokens import Claims
    from kakehashi.store.service.work import Job

_STATUS = {
    "credential": 401,
    "not-found": 404,
    "method": 405,
    "not-acceptable": 406,
    "changed": 409,
    "malformed": 422,
    "limit": 429,
    "full": 507,
    "slow": 503,
    "superseded": 503,
    "gone": 503,
    "packing": 503,
}
"""HTTP status of each code; every other refusal is 403."""

_log = logging.getLogger("kakehashi.catalogue")


class _Handler(RequestHandler):
    """One address; its methods are those of its routes."""

    def initialize(
        self, parts: Parts, routes: dict[str, Route], newest: dict[tuple[str, str], Job]
    ) -> None:
        self.parts = parts
        self.routes = routes
        self.newest = newest
        self.claims: Claims | None = None
        self.call: Call | None = None
        self.entered = False

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", f"{JSON}; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.clear_header("Server")

    def compute_etag(self) -> None:
        """Return none: nothing is kept that could be asked for again."""

    def prepare(self) -> None:
        scheme, _, token = self.request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or len(token) > LONGEST_TOKEN:
            raise RefusedError("credential", "this is not a valid token for the catalogue")
        claims = self.parts.tokens.verify(Secret(token))
        self.parts.limiter.enter(claims.session)
        self.claims, self.entered = claims, True
        project = self.parts.project(claims.project)
        if project is None or not self.parts.is_live(claims.session):
            raise RefusedError("no-access", "this session has no access")
        if not self.routes:
            raise RefusedError("not-found", "there is nothing at this address")
        if (self.request.method or "") not in self.routes:
            raise RefusedError("method", "this address does not know that method")
        self.call = Call(self.parts, claims, project, self, self.newest)

    async def get(self, **_parts: str) -> None:
        await self._answer()

    async def post(self, **_parts: str) -> None:
        await self._answer()

    async def _answer(self) -> None:
        if self.call is None:  # prepare() has refused it
            return
        answer = await self.routes[self.request.method or ""].run(self.call)
        if answer is not None:
            self.write(answer.model_dump_json())

    def on_connection_close(self) -> None:
        if self.call is not None:
            self.call.job.call_off("gone", "nobody waits for the answer any more")

    def on_finish(self) -> None:
        if self.call is not None:
            self.call.gone()
        if self.entered and self.claims is not None:
            self.parts.limiter.leave(self.claims.session)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        # Tornado would print the whole request; a refusal is seen in the line of the request.
        if not isinstance(value, (RefusedError, HTTPError)):
            _log.error("%s failed", self.name(), exc_info=(typ, value, tb))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        self.set_default_headers()
        if isinstance(error, RefusedError):
            self.set_status(_STATUS.get(error.code, 403))
            if self.get_status() in {429, 503}:
                self.set_header("Retry-After", "1")
            self._refuse(error.code, str(error))
        elif status_code < 500:
            self.set_status(_STATUS["malformed"])
            self._refuse("malformed", "the request cannot be understood")
        else:
            self._refuse("internal", "the catalogue failed; its log says why")

    def _refuse(self, code: str, message: str) -> None:
        self.write(as_json({"error": code, "message": message}))

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        if self._headers_written:
            # What has gone out cannot be taken back: the other side must see that it is cut.
            error = kwargs.get("exc_info", (None, None, None))[1]
            if not isinstance(error, CalledOffError):
                _log.info("%s was cut off", self.name())
            cast("Any", self.request.connection).stream.close()
            self.on_finish()
            return
        super().send_error(status_code, **kwargs)

    def name(self) -> str:
        """Return what was asked for without what was sought."""
        route = self.routes.get(self.request.method or "")
        return f"{self.request.method} {route.path if route else '(nothing)'}"


def _log_request(handler: RequestHandler) -> None:
    # The address itself would have the UID that somebody looked at.
    name = handler.name() if isinstance(handler, _Handler) else "(unknown)"
    claims = handler.claims if isinstance(handler, _Handler) else None
    _log.info(
        "%s: %d in %.0f ms, session %s",
        name,
        handler.get_status(),
        1000 * handler.request.request_time(),
        claims.session if claims else "none",
    )


def application(parts: Parts) -> Application:
    """Return the web application."""
    by_path: defaultdict[str, dict[str, Route]] = defaultdict(dict)
    for route in ROUTES:
        by_path[route.path][route.method] = route
    newest: dict[tuple[str, str], Job] = {}
    shared: dict[str, Any] = {"parts": parts, "newest": newest}
    return Application(
        [
            (_pattern(path), _Handler, {**shared, "routes": routes})
            for path, routes in by_path.items()
        ],
        default_handler_class=_Handler,
        default_handler_args={**shared, "routes": {}},
        log_function=_log_request,
    )


def _pattern(path: str) -> str:
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]{1,128})", re.escape(path))


def http_server(parts: Parts, context: ssl.SSLContext | None) -> HTTPServer:
    """Return a server with the limits of the service."""
    return HTTPServer(
        application(parts),
        ssl_options=context,
        max_body_size=MAX_BODY,
        max_header_size=16 * 1024,
        idle_connection_timeout=60,
        body_timeout=30,
    )
