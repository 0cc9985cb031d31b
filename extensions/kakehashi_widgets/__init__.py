"""The browser's side: cohort table, viewer, session clock, traffic.

In a notebook: ``from kakehashi_widgets import CohortTable, SliceViewer, SessionClock, Traffic``.
The package is also JupyterLab's server extension; neither side loads the other's imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jupyter_server.serverapp import ServerApp

    from kakehashi_widgets.widgets import CohortTable, SessionClock, SliceViewer, Traffic

__all__ = ["CohortTable", "SessionClock", "SliceViewer", "Traffic"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from kakehashi_widgets import widgets  # noqa: PLC0415 - the server needs no widgets

        return getattr(widgets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "kakehashi_widgets"}]


def _link_jupyter_server_extension(app: ServerApp) -> None:
    from kakehashi_widgets import server  # noqa: PLC0415 - a kernel needs no server

    server.link(app)


def _load_jupyter_server_extension(app: ServerApp) -> None:
    from kakehashi_widgets import server  # noqa: PLC0415 - a kernel needs no server

    server.load(app)
