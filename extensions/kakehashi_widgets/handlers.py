"""HTTP for the widgets: rows, series, planes, the session's clock.

Reads run in a small pool of threads, so that a slow link never holds the server up, and a
request that the browser has dropped is not begun.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import json
from dataclasses import asdict, astuple
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from tornado import web

from kakehashi.errors import (
    BlockMismatchError,
    KakehashiError,
    LinkClosedError,
    SessionError,
)
from kakehashi.link import Session
from kakehashi.link.manifest import NotInManifestError
from kakehashi.link.traffic import TrafficLog, outages
from kakehashi_widgets.planes import OutOfRangeError, read_plane

if TYPE_CHECKING:
    from collections.abc import Callable

    from kakehashi_widgets.shelf import Shelf

_Result = TypeVar("_Result")


class _RefusalError(Exception):
    """An answer other than 200, in words for the person."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def _refusal(error: Exception) -> _RefusalError:
    if isinstance(error, _RefusalError):
        return error
    status, words = HTTPStatus.BAD_GATEWAY, "{}"
    match error:
        case NotInManifestError() | SessionError():
            status = HTTPStatus.NOT_FOUND
        case OutOfRangeError():
            status = HTTPStatus.BAD_REQUEST
        case BlockMismatchError():
            words = (
                "The store sent bytes that are not those of the manifest, so nothing is shown. "
                "Tell the platform's administrators. ({})"
            )
        case LinkClosedError():
            status = HTTPStatus.SERVICE_UNAVAILABLE
            words = "The link to the store is closed: the session has ended or is ending. ({})"
    return _RefusalError(status, words.format(error))


class _Handler(APIHandler):
    auth_resource = "kakehashi"

    def initialize(self) -> None:
        self._work: asyncio.Future[Any] | None = None
        self._gone = False

    @property
    def shelf(self) -> Shelf:
        shelf: Shelf = self.settings["kakehashi_shelf"]
        return shelf

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Cache-Control", "no-store")

    def compute_etag(self) -> None:
        """Nothing is to be kept, so there is nothing to compare."""

    def on_connection_close(self) -> None:
        self._gone = True
        if self._work is not None:
            self._work.cancel()
        super().on_connection_close()

    async def off_loop(self, work: Callable[[], _Result]) -> _Result:
        """Run `work` in the shelf's threads; dropped if the browser leaves before it begins."""
        self._work = asyncio.wrap_future(self.shelf.threads.submit(work))
        result: _Result = await self._work
        return result

    async def answer(self, make: Callable[[], bytes], content_type: str) -> None:
        """Send what `make` returns, or the refusal that its error stands for."""
        squeeze = "gzip" in self.request.headers.get("Accept-Encoding", "")

        def work() -> bytes:
            body = make()
            return gzip.compress(body, compresslevel=1, mtime=0) if squeeze else body

        try:
            body = await self.off_loop(work)
        except asyncio.CancelledError:
            if not self._gone:
                raise
            return
        except (KakehashiError, OutOfRangeError, _RefusalError) as error:
            self.refuse(_refusal(error))
            return
        if self._gone:
            return
        self.set_header("Content-Type", content_type)
        self.set_header("Vary", "Accept-Encoding")
        if squeeze:
            self.set_header("Content-Encoding", "gzip")
        await self.finish(body)

    def refuse(self, refusal: _RefusalError) -> None:
        self.set_status(refusal.status)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"message": str(refusal)}))

    def whole_number(self, name: str, text: str) -> int:
        # int() would also take '1_0', ' 1' and digits of other scripts.
        if not (text.isascii() and text.isdigit() and len(text) <= 9):
            raise _RefusalError(HTTPStatus.BAD_REQUEST, f"{name} must be a whole number from 0 up")
        return int(text)


class CohortHandler(_Handler):
    """The rows of the cohort."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """Answer ``{"rows": [{"uid", ...}]}``."""
        await self.answer(lambda: _json({"rows": self.shelf.rows()}), "application/json")


class SeriesHandler(_Handler):
    """What a viewer has to know of a series before its first plane."""

    @web.authenticated
    @authorized
    async def get(self, uid: str) -> None:
        """Answer the description, see :meth:`Shelf.describe`."""
        await self.answer(lambda: _json(self.shelf.describe(uid)), "application/json")


class SliceHandler(_Handler):
    """One plane of rescaled values, little-endian, row by row."""

    @web.authenticated
    @authorized
    async def get(self, uid: str, axis: str, index: str) -> None:
        """Answer the plane; shape and type are in the headers X-Kakehashi-Shape and -Dtype."""
        try:
            position = self.whole_number("the index", index)
            level = self.whole_number("level", self.get_query_argument("level", "0"))
        except _RefusalError as refusal:
            self.refuse(refusal)
            return
        await self.answer(
            partial(self._read, uid, axis, position, level), "application/octet-stream"
        )

    def _read(self, uid: str, axis: str, index: int, level: int) -> bytes:
        plane = read_plane(self.shelf.series(uid).pack, axis, index, level)
        rows, columns = plane.shape
        self.set_header("X-Kakehashi-Shape", f"{rows},{columns}")
        self.set_header("X-Kakehashi-Dtype", plane.dtype.name)
        return plane.astype(plane.dtype.newbyteorder("<"), copy=False).tobytes()


class SessionHandler(_Handler):
    """How long the session lasts, and whether its right to the store lives."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """Answer the clock; ``now`` lets a browser with a wrong clock count right."""
        try:
            session = Session.current()
            lease = session.lease()
        except SessionError as error:
            self.refuse(_refusal(error))
            return
        await self.finish(
            {
                "now": dt.datetime.now(dt.UTC).isoformat(),
                "session": session.session,
                "person": session.person,
                "project": session.project,
                "site": session.site,
                "ends_at": min(session.ends_at, lease.ends_at).isoformat(),
                "lease": {
                    "state": lease.state,
                    "expires_at": lease.expires_at.isoformat(),
                    "message": lease.message,
                },
            }
        )


class TrafficHandler(_Handler):
    """What the session's processes have read, by the second; no names, no images."""

    # A picture that is left open is nobody at work.
    _track_activity = False

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """Answer the last ``seconds`` of the session's traffic, and the figures so far."""
        try:
            back = self.whole_number("seconds", self.get_query_argument("seconds", "3600"))
        except _RefusalError as refusal:
            self.refuse(refusal)
            return
        await self.answer(partial(self._read, back), "application/json")

    def _read(self, back: int) -> bytes:
        log = TrafficLog()
        now = dt.datetime.now(dt.UTC).timestamp()
        seconds = log.seconds()
        return _json(
            {
                "now": now,
                "seconds": [astuple(one) for one in seconds if one.at >= int(now) - back],
                "outages": [[one.begin, one.end] for one in outages(seconds)],
                "summary": asdict(log.summary()),
            }
        )


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
