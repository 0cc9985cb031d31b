"""What a browser may keep of the person's server: nothing but the files that all share.

Tornado makes one :class:`Unkept` for each request, whatever handler answers it, so that an
endpoint of Jupyter's that nobody thought of is covered as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from jupyter_server.utils import url_path_join
from tornado.web import OutputTransform

if TYPE_CHECKING:
    from tornado.httputil import HTTPHeaders, HTTPServerRequest

STATIC: Final = ("static/", "lab/extensions/")
"""Below the server's address: JupyterLab's own files, the same for everybody."""

# Pages load, and send, nothing elsewhere: what an output asks for would tell that somebody looks,
# and could tell what. JupyterLab compiles its schemas, and widgets are modules from blobs.
POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-src 'self' data: blob:; object-src 'self' data: blob:; form-action 'self'; "
    "base-uri 'self'"
)


class Unkept(OutputTransform):
    """Forbids to keep an answer, unless it is one of the files that all share.

    Attributes
    ----------
    shared : tuple of str
        Paths below which those files are.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def below(cls, base: str) -> type[Unkept]:
        """Return the transform of a server at an address."""

        class Here(cls):  # type: ignore[misc, valid-type]  # a class by its variable
            shared = tuple(url_path_join(base, path) for path in STATIC)

        return Here

    def __init__(self, request: HTTPServerRequest) -> None:
        self._shared = request.path.startswith(self.shared)

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
        if headers.get("Content-Type", "").startswith("text/html"):
            # Beside the server's own policy: a browser keeps to both.
            headers.add("Content-Security-Policy", POLICY)
            headers["Referrer-Policy"] = "same-origin"
        return status_code, headers, chunk
