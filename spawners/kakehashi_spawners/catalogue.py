"""A session's way to the store's catalogue: the hub hands requests and answers on, unread.

Who may ask what is decided at the store, by the token that it gave with the lease. The hub looks
only at which session asks, and from where.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from tornado import web
from tornado.httpclient import HTTPError as HttpStatusError
from tornado.httpclient import HTTPRequest
from tornado.simple_httpclient import SimpleAsyncHTTPClient

from kakehashi.errors import RefusedError, StoreError
from kakehashi_spawners.endpoints import (
    QuietHandler,
    Refusals,
    check_address,
    proxy_certificate_of,
    session_of,
    source_address,
)
from kakehashi_spawners.portal import current

if TYPE_CHECKING:
    from typing import ClassVar

MAX_REQUEST = 256 * 1024
MAX_ANSWER = 4 << 30
"""Bytes of an answer; it is handed on as it comes, and never held whole."""

CONNECT_S = 10.0
ANSWER_S = 300.0
"""Seconds that a whole answer may take, rows of a large cohort included."""

_ASKED = ("Authorization", "Content-Type", "Accept")
_ANSWERED = ("Content-Type", "Retry-After")


@web.stream_request_body
class CatalogueHandler(QuietHandler):
    """``catalogue/SESSION/v1/...``: to the store and back."""

    # No cookie and no token of the hub: the store's own token is what decides.
    _accept_cookie_auth = False
    _accept_token_auth = False
    refusals: ClassVar[Refusals] = Refusals()

    async def prepare(self) -> None:
        """Bound the body before it is read."""
        self._chunks: list[bytes] = []
        self.request.connection.set_max_body_size(MAX_REQUEST)
        await super().prepare()

    def data_received(self, chunk: bytes) -> None:
        """Collect the body."""
        self._chunks.append(chunk)

    async def get(self, session: str, path: str) -> None:
        """Hand a question on."""
        await self._relay(session, path, None)

    async def post(self, session: str, path: str) -> None:
        """Hand a question with a body on."""
        await self._relay(session, path, b"".join(self._chunks))

    async def _relay(self, session: str, path: str, body: bytes | None) -> None:
        portal = current()
        address = source_address(self.request, proxy_certificate_of(portal))
        key = f"address {address}"
        self.refusals.check(key)
        try:
            check_address(portal, session_of(portal.sessions.get(session)), address)
        except RefusedError:
            self.refusals.add(key)
            raise
        endpoint = portal.config.need_authority()
        if endpoint.catalogue_url is None:
            raise RefusedError("session", "this portal's store has no catalogue service")
        query = f"?{self.request.query}" if self.request.query else ""
        request = HTTPRequest(
            f"{endpoint.catalogue_url}/{path}{query}",
            method=self.request.method or "GET",
            headers={
                name: self.request.headers[name] for name in _ASKED if name in self.request.headers
            },
            body=body,
            connect_timeout=CONNECT_S,
            request_timeout=ANSWER_S,
            follow_redirects=False,
            header_callback=self._on_header,
            streaming_callback=self._on_chunk,
            ssl_options=ssl.create_default_context(cafile=endpoint.ca_file)
            if endpoint.catalogue_url.startswith("https:")
            else None,
        )
        self._begun = False
        self.set_header("Cache-Control", "no-store")
        client = SimpleAsyncHTTPClient(force_instance=True, max_body_size=MAX_ANSWER)
        try:
            response = await client.fetch(request, raise_error=False)
        except (OSError, HttpStatusError) as error:
            raise StoreError(f"the store's catalogue gave no answer: {error}") from None
        finally:
            client.close()
        if response.code == 599 and not self._begun:
            raise StoreError(f"the store's catalogue gave no answer: {response.reason}")
        if response.code == 599:
            # What has gone out cannot be taken back: the other side must see that it is cut.
            self.request.connection.stream.close()
            return
        self.set_status(response.code)
        # JupyterHub's own finish gives nothing to wait for.
        self.finish()

    def _on_header(self, line: str) -> None:
        name, colon, value = line.partition(":")
        if line.startswith("HTTP/"):
            self.set_status(int(line.split()[1]))
        elif colon and name.title() in _ANSWERED:
            self.set_header(name.title(), value.strip())

    async def _on_chunk(self, chunk: bytes) -> None:
        self._begun = True
        self.write(chunk)
        await self.flush()


# Each part begins with a letter or digit: no way up.
_PATH = r"(v1(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,100}){1,5})"
HANDLERS = [(rf"/api/kakehashi/catalogue/([0-9a-f]{{32}})/{_PATH}", CatalogueHandler)]
