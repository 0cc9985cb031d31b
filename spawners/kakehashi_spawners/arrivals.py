"""The operators' page of what hospitals sent, against what they say they sent.

:func:`lay_out` puts the store's summary into the rows and columns that the page shows;
:class:`ArrivalsHandler` answers the page.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final, Literal

from jupyterhub.handlers.base import BaseHandler
from tornado import web
from tornado.log import app_log

from kakehashi.errors import KakehashiError
from kakehashi_spawners import i18n
from kakehashi_spawners.portal import current

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kakehashi.store.arrivals_summary import ArrivalDay, Arrivals, Quarantined

DAYS: Final = 14
HELD_BACK: Final = "held back: "
"""How the store begins the reason of what stands under that heading here."""
OLD_AFTER: Final = dt.timedelta(minutes=15)

State = Literal["complete", "missing", "nothing", "unlisted", "quiet"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A hospital's day, or the sum of several.

    Attributes
    ----------
    received : int
        Objects that came.
    expected : int or None
        Objects of the lists; None where one of the days has none.
    missing, studies_missing : int
        Objects of the lists that have not come, and studies that they belong to.
    quarantined, bytes : int
    listed, unlisted : int
        Hospitals' days with a list, and those without on which something came.
    """

    received: int = 0
    expected: int | None = None
    missing: int = 0
    studies_missing: int = 0
    quarantined: int = 0
    bytes: int = 0
    listed: int = 0
    unlisted: int = 0

    @property
    def state(self) -> State:
        """What the mark says."""
        if self.missing:
            return "missing" if self.received or self.missing != self.expected else "nothing"
        if self.expected is not None:
            return "complete"
        return "unlisted" if self.unlisted else "quiet"

    @property
    def share(self) -> int | None:
        """Per cent of the list that came, rounded down; None without a whole list."""
        if not self.expected:
            return None
        return 100 * (self.expected - self.missing) // self.expected

    @property
    def size(self) -> str:
        """Bytes as a person writes them."""
        amount, unit = float(self.bytes), "B"
        for larger in ("kB", "MB", "GB", "TB"):
            if amount < 1000:
                break
            amount, unit = amount / 1000, larger
        return f"{amount:.1f} {unit}" if amount < 100 and unit != "B" else f"{amount:,.0f} {unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """One hospital."""

    facility: str
    total: Cell
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """What the page shows.

    Attributes
    ----------
    days : tuple of date
        The last ``DAYS`` ones, the newest first: the columns.
    rows : tuple of Row
    totals : tuple of Cell
        Of all hospitals, by day.
    total : Cell
        Of all of it.
    held, stopped : tuple of Quarantined
        Held back by the de-identification; in quarantine for other reasons.
    old : bool
        Whether the summary is older than ``OLD_AFTER``.
    """

    days: tuple[dt.date, ...]
    rows: tuple[Row, ...]
    totals: tuple[Cell, ...]
    total: Cell
    held: tuple[Quarantined, ...]
    stopped: tuple[Quarantined, ...]
    old: bool


class ArrivalsHandler(BaseHandler):  # type: ignore[misc]  # jupyterhub has no types
    """The page, for whom JupyterHub's own administration page is."""

    @web.authenticated
    async def get(self) -> None:
        """Ask the store, and render what it says, or that it says nothing."""
        if not self.has_scope("admin-ui"):
            raise web.HTTPError(403, "this page is for the portal's operators")
        summary: Arrivals | None = None
        silent = ""
        try:
            summary = await current().authority.arrivals()
        except KakehashiError as error:
            app_log.warning("the arrivals are not known: %s", error)
            silent = str(error)
            self.set_status(503)
        table = None if summary is None else lay_out(summary, dt.datetime.now(dt.UTC))
        self.finish(
            await self.render_template(
                "arrivals.html",
                summary=summary,
                table=table,
                silent=silent,
                day_count=DAYS,
                reason=reason,
            )
        )


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something does not go on, and in which language that is said."""

    text: str
    language: i18n.Language


def reason(said: str) -> Reason:
    """Say the store's reason in the language of the request, as far as the words have it."""
    text = said.removeprefix(HELD_BACK)
    key = _reasons().get(text)
    if key is None:
        return Reason(text, "en")
    return Reason(i18n.translate(key), i18n.current_language())


@cache
def _reasons() -> dict[str, str]:
    """Return the keys of the reasons, by what the store says in English."""
    words = i18n.catalogue("en")
    return {words[key]: key for key in words if key.startswith("arrivals.reason-")}


def lay_out(summary: Arrivals, now: dt.datetime) -> Table:
    """Put a summary into rows and columns.

    Parameters
    ----------
    summary : Arrivals
    now : datetime
        With its zone.

    Returns
    -------
    Table
    """
    written = summary.written_at.astimezone(dt.UTC).date()
    # The store's day may be one ahead of UTC's; what is later than that is no day that was.
    latest = written + dt.timedelta(days=1)
    known = [day.day for one in summary.facilities for day in one.days if day.day <= latest]
    newest = max([written, *known])
    days = tuple(newest - dt.timedelta(days=back) for back in range(DAYS))
    rows = []
    for one in sorted(summary.facilities, key=lambda one: one.facility):
        by_day = {day.day: day for day in one.days}
        cells = tuple(_cell(by_day.get(day)) for day in days)
        rows.append(Row(one.facility, _sum(cells), cells))
    columns = zip(*(row.cells for row in rows), strict=True)
    quarantine = sorted(summary.quarantine, key=lambda one: (one.facility, -one.count, one.reason))
    return Table(
        days=days,
        rows=tuple(rows),
        totals=tuple(_sum(column) for column in columns),
        total=_sum(cell for row in rows for cell in row.cells),
        held=tuple(one for one in quarantine if one.held_back),
        stopped=tuple(one for one in quarantine if not one.held_back),
        old=now - summary.written_at > OLD_AFTER,
    )


def _cell(day: ArrivalDay | None) -> Cell:
    if day is None:
        return Cell()
    return Cell(
        received=day.received,
        expected=day.expected,
        missing=day.missing or 0,
        studies_missing=day.studies_missing or 0,
        quarantined=day.quarantined,
        bytes=day.bytes,
        listed=int(day.expected is not None),
        unlisted=int(day.expected is None and day.received + day.quarantined > 0),
    )


def _sum(cells: Iterable[Cell]) -> Cell:
    cells = tuple(cells)
    unlisted = sum(cell.unlisted for cell in cells)
    expected = [cell.expected for cell in cells if cell.expected is not None]
    return Cell(
        received=sum(cell.received for cell in cells),
        # What came of lists and without them cannot be told apart in a sum.
        expected=sum(expected) if expected and not unlisted else None,
        missing=sum(cell.missing for cell in cells),
        studies_missing=sum(cell.studies_missing for cell in cells),
        quarantined=sum(cell.quarantined for cell in cells),
        bytes=sum(cell.bytes for cell in cells),
        listed=sum(cell.listed for cell in cells),
        unlisted=unlisted,
    )
