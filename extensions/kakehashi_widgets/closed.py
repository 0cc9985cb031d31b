"""What answers where Jupyter would hand files out of the session."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import NoReturn

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler, JupyterHandler
from tornado import web

_MESSAGE = (
    "Downloads and exports are switched off here: files leave the platform only through "
    "reviewed export. Your work folder stays at the store."
)


class ClosedHandler(JupyterHandler):
    """Refuses every download and export, after the usual authentication."""

    auth_resource = "contents"

    @web.authenticated
    @authorized
    def get(self, *_: str, **__: str) -> NoReturn:
        """Refuse."""
        raise web.HTTPError(HTTPStatus.FORBIDDEN, _MESSAGE)

    head = get
    post = get

    def write_error(self, status_code: int, **_: object) -> None:
        """Answer in JSON with the reason."""
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps({"message": _MESSAGE if status_code == 403 else self._reason}))


class NoFormatsHandler(APIHandler):
    """The formats that notebooks can be exported to: none, said so that the lab understands it."""

    auth_resource = "nbconvert"

    @web.authenticated
    @authorized
    def get(self) -> None:
        """Answer an empty list."""
        self.finish({})
