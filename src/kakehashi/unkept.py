"""What a browser may keep of an answer: nothing but the files that are the same for everybody.

Tornado makes one :class:`Unkept` for each request, whatever handler answers it, so that an
endpoint that nobody thought of is covered as well. Hub and session's server each have theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tornado.web import OutputTransform

if TYPE_CHECKING:
    from tornado.httputil import HTTPHeaders, HTTPServerRequest


class Unkept(OutputTransform):
    """Forbids to keep an answer, and says what a page may load.

    Parameters
    ----------
    shared : tuple of str
        Paths below which the files are that all share.
    policy : str
        Content security policy of pages. It stands beside the server's own: a browser keeps to
        both.
    request : HTTPServerRequest
    """

    def __init__(self, shared: tuple[str, ...], policy: str, request: HTTPServerRequest) -> None:
        self._shared = request.path.startswith(shared)
        self._policy = policy

    def transform_first_chunk(
        self,
        status_code: int,
        headers: HTTPHeaders,
        chunk: bytes,
        finishing: bool,  # noqa: FBT001 - tornado's signature
    ) -> tuple[int, HTTPHeaders, bytes]:
        """Add what browsers obey."""
        _ = finishing
        if not (self._shared and status_code in {200, 206, 304}):
            headers["Cache-Control"] = "no-store"
        page = headers.get("Content-Type", "").startswith("text/html")
        if page:
            headers.add("Content-Security-Policy", self._policy)
            headers["Referrer-Policy"] = "same-origin"
        self.add(headers, page=page)
        return status_code, headers, chunk

    def add(self, headers: HTTPHeaders, *, page: bool) -> None:
        """Add what one server says besides."""
