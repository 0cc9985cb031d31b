"""Widgets for notebooks. Rows and pixels go from the server to the browser, not through here.

So a notebook that is saved with its widgets' state holds identifiers and settings, no image.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets
from traitlets import validate

if TYPE_CHECKING:
    from kakehashi.link import Series, Store
    from kakehashi.link.traffic import TrafficLog

_STATIC = Path(__file__).parent / "static"


def _built(name: str) -> Path:
    path = _STATIC / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the widgets' browser part is not built here. "
            "Run 'make install' where Kakehashi is installed."
        )
    return path


def _uid(series: Series | str) -> str:
    return series if isinstance(series, str) else series.uid


class CohortTable(anywidget.AnyWidget):
    """The series of the session's cohort: search, sort, choose one.

    Parameters
    ----------
    store : Store, optional
        Where :attr:`series` opens the chosen series. The rows themselves come to the browser
        from the session's server.

    Attributes
    ----------
    selected : str
        SeriesInstanceUID of the chosen row, empty if none is chosen. May be set.

    Examples
    --------
    >>> table = CohortTable(store)  # doctest: +SKIP
    >>> table  # doctest: +SKIP
    """

    _esm = _built("cohort.js")
    _css = _built("style.css")

    selected = traitlets.Unicode("").tag(sync=True)

    def __init__(self, store: Store | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._store = store

    @property
    def series(self) -> Series:
        """The chosen series.

        Raises
        ------
        ValueError
            Nothing is chosen, or the table was made without a store.
        """
        if self._store is None:
            raise ValueError("the table has no store; make it as CohortTable(store)")
        if not self.selected:
            raise ValueError("no series is chosen; click a row of the table first")
        return self._store.series(self.selected)


class SliceViewer(anywidget.AnyWidget):
    """The slices of one series, as they were acquired.

    Wheel, arrow keys or slider change the slice; a drag changes window and level; ctrl and
    wheel zoom. Grey is ``(value - level) / window + 1/2`` of the way from black to white
    (DICOM's LINEAR_EXACT).

    Parameters
    ----------
    series : Series or str
        The series or its SeriesInstanceUID; a string may be empty for none.
    index : int, optional
        Slice to begin with, from 0; the middle one if not given.
    window, level : float, optional
        Width and centre of the grey scale, in the unit of the values (HU for CT); by default
        soft tissue for CT, else from the values themselves.

    Attributes
    ----------
    uid : str
        The series on show. When it changes, index, window and level are chosen anew.
    index : int or None
        Slice on show, from 0; None until the browser has chosen the middle one.
    window, level : float or None
        Likewise.
    """

    _esm = _built("viewer.js")
    _css = _built("style.css")

    uid = traitlets.Unicode("").tag(sync=True)
    index = traitlets.Int(None, allow_none=True).tag(sync=True)
    window = traitlets.Float(None, allow_none=True).tag(sync=True)
    level = traitlets.Float(None, allow_none=True).tag(sync=True)

    def __init__(
        self,
        series: Series | str = "",
        *,
        index: int | None = None,
        window: float | None = None,
        level: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(uid=_uid(series), index=index, window=window, level=level, **settings)
        self.observe(self._forget, "uid")

    def _forget(self, _change: object) -> None:
        with self.hold_sync():
            self.index = self.window = self.level = None

    @validate("index")
    def _check_index(self, proposal: dict[str, Any]) -> int | None:
        index: int | None = proposal["value"]
        if index is not None and index < 0:
            raise traitlets.TraitError(f"index must be 0 or more, got {index}")
        return index

    @validate("window")
    def _check_window(self, proposal: dict[str, Any]) -> float | None:
        window: float | None = proposal["value"]
        if window is not None and not window > 0:
            raise traitlets.TraitError(f"window must be more than 0, got {window}")
        return window


class SessionClock(anywidget.AnyWidget):
    """Time left in the session, and whether its link to the store lives."""

    _esm = _built("clock.js")
    _css = _built("style.css")


class Traffic(anywidget.AnyWidget):
    """What this session reads from the store, live, with the steps of its training loops.

    All processes of the session that read through Kakehashi's Python interface are in it: every
    notebook, workers of a loader too; and what is read for programs below the verified view. The
    figures come to the browser from the session's server, so they go on while a cell runs, and
    nothing of them is saved with the notebook; :meth:`save_png` keeps a picture.

    Parameters
    ----------
    minutes : int
        How far back it shows, 1 to 60; may be set.

    Examples
    --------
    >>> traffic = Traffic()  # doctest: +SKIP
    >>> traffic  # doctest: +SKIP
    >>> traffic.save_png("traffic.png")  # doctest: +SKIP
    """

    _esm = _built("traffic.js")
    _css = _built("style.css")

    minutes = traitlets.Int(5, min=1, max=60).tag(sync=True)

    def __init__(self, minutes: int = 5, **settings: Any) -> None:
        super().__init__(minutes=minutes, **settings)

    @property
    def log(self) -> TrafficLog:
        """The figures themselves; shown in a notebook it is a table of the site."""
        from kakehashi.link.traffic import TrafficLog  # noqa: PLC0415 - only where it is asked for

        return TrafficLog()

    def save_png(self, path: Path | str) -> None:
        """Write the session's traffic as a picture for a paper.

        Raises
        ------
        SessionError
            This is not inside a session.
        """
        self.log.save_png(path)
