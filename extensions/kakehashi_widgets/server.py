"""The jupyter-server extension: images by HTTP to the widgets, downloads closed."""

# mypy: allow-untyped-calls
# (jupyter_server says that it is typed, and leaves many functions without types)

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from jupyter_server.utils import url_path_join

from kakehashi.unkept import Unkept
from kakehashi_widgets.closed import ClosedHandler, NoFormatsHandler
from kakehashi_widgets.examples import lay_for_session
from kakehashi_widgets.handlers import (
    CohortHandler,
    SeriesHandler,
    SessionHandler,
    SliceHandler,
    TrafficHandler,
)
from kakehashi_widgets.shelf import Shelf

if TYPE_CHECKING:
    from jupyter_server.serverapp import ServerApp
    from tornado.httputil import HTTPServerRequest

_UID = r"([0-9][0-9.]*)"
_LAB_PLUGINS = Path(__file__).parent / "labextension"

_ROUTES = [
    (r"kakehashi/cohort", CohortHandler),
    (r"kakehashi/session", SessionHandler),
    (r"kakehashi/traffic", TrafficHandler),
    (rf"kakehashi/series/{_UID}", SeriesHandler),
    (rf"kakehashi/series/{_UID}/slice/([^/]+)/([^/]+)", SliceHandler),
    (r"api/nbconvert", NoFormatsHandler),
]
# Jupyter's own ways to hand a file out: raw files, and notebooks turned into other formats.
_CLOSED = [r"files(?:/.*)?", r"view(?:/.*)?", r"nbconvert(?:/.*)?"]

# Below the server's address: JupyterLab's own files, the same for everybody.
STATIC: Final = ("static/", "lab/extensions/")
# Pages load, and send, nothing elsewhere: what an output asks for would tell that somebody looks,
# and could tell what. JupyterLab compiles its schemas, and widgets are modules from blobs.
POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-src 'self' data: blob:; object-src 'self' data: blob:; form-action 'self'; "
    "base-uri 'self'"
)


def link(app: ServerApp) -> None:
    """Let JupyterLab find the plugin that takes its download and export commands away.

    Called before any extension is loaded, so that the lab's list of plugins can still grow.
    """
    for point in app.extension_manager.extension_points.values():
        extension = point.app
        if extension is None or not hasattr(extension, "extra_labextensions_path"):
            continue
        extension.extra_labextensions_path = [
            str(_LAB_PLUGINS),
            *extension.extra_labextensions_path,
        ]


def load(app: ServerApp) -> None:
    """Lay the examples; add the routes before Jupyter's own, so that the closed ones win.

    All answers, Jupyter's own too, are told not to be kept.
    """
    lay_for_session()
    base = app.web_app.settings["base_url"]
    shared = tuple(url_path_join(base, path) for path in STATIC)

    class UnkeptHere(Unkept):
        def __init__(self, request: HTTPServerRequest) -> None:
            super().__init__(shared, POLICY, request)

    app.web_app.add_transform(UnkeptHere)
    app.web_app.settings["kakehashi_shelf"] = Shelf()
    app.web_app.add_handlers(
        ".*$",
        [
            *((url_path_join(base, path), handler) for path, handler in _ROUTES),
            *((url_path_join(base, path), ClosedHandler) for path in _CLOSED),
        ],
    )
