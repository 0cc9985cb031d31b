"""A session's traffic over time, with the steps of its training loops on it.

What every process of the session has read through :mod:`kakehashi.link` is in it: kernels, workers
of a loader, the server behind the widgets; and what was read for programs below the view, if that
is the verified one. What is written to the work folder or saved as a checkpoint is not.
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import os
import statistics
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kakehashi.link import recorder, tally
from kakehashi.link.moments import together
from kakehashi.link.session import Session
from kakehashi.link.tally import MINUTE, SECOND, Moment, Tally

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.figure import Figure

__all__ = ["Moment", "Outage", "Summary", "TrafficLog", "outages", "site_table"]

OUTAGE_S = 2
"""Whole seconds without a byte, though some were asked for, that are called an outage."""

_ANSWER_S = 1.0

MEGABYTE = 1_000_000
_SUMMARY = 1


@dataclass(frozen=True)
class Outage:
    """A time in which bytes were asked for and none came.

    Attributes
    ----------
    begin, end : int
        Its first second, and the one after its last, seconds since 1970.
    """

    begin: int
    end: int

    @property
    def seconds(self) -> int:
        """How long it was."""
        return self.end - self.begin


def outages(seconds: Iterable[Moment]) -> tuple[Outage, ...]:
    """Return the outages among moments of a second each, oldest first."""
    found: list[Outage] = []
    begin = end = 0
    for one in (*seconds, None):
        if one is not None and one.stalled_s and one.at == end:
            end += 1
            continue
        if end - begin >= OUTAGE_S:
            found.append(Outage(begin, end))
        begin = end = 0
        if one is not None and one.stalled_s:
            begin, end = one.at, one.at + 1
    return tuple(found)


@dataclass(frozen=True)
class Summary:
    """A session's traffic in a few figures; may be kept in the work folder.

    Attributes
    ----------
    session, site : str
        Which session, and where.
    begin, end : int
        The first and the last second of which something is known, seconds since 1970.
    bytes : int
        Verified bytes read from the store, within the last week.
    mean_rate : float
        Bytes a second, over the seconds in which some were asked for.
    best_rate : float
        Bytes in the best second of the last hour.
    rtt_s : float or None
        Shortest round trip: a small request to the store, with its answer.
    rtt_median_s : float or None
        Median over the last hour's seconds of the shortest one known at the time.
    channels : int
        Channels at most, all processes together.
    steps : int
        Batches that loops were given.
    waited_s : float
        Seconds that loops waited for them, summed over loops.
    reconnects, rereads : int
        Channels lost or not opened; pieces read again because they came wrong.
    outages : int
        Outages of the last hour.
    outage_s : int
        Seconds of those.
    """

    session: str
    site: str
    begin: int
    end: int
    bytes: int
    mean_rate: float
    best_rate: float
    rtt_s: float | None
    rtt_median_s: float | None
    channels: int
    steps: int
    waited_s: float
    reconnects: int
    rereads: int
    outages: int
    outage_s: int

    def save(self, path: Path | str) -> None:
        """Write it as JSON, for a table of several sessions."""
        text = json.dumps({"kakehashi_traffic": _SUMMARY, **asdict(self)}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            It is something else.
        """
        expected = f"{path}: expected a summary of traffic that Summary.save wrote"
        try:
            data = json.loads(Path(path).read_bytes())
        except ValueError:
            raise ValueError(expected) from None
        if not isinstance(data, dict) or data.pop("kakehashi_traffic", None) != _SUMMARY:
            raise ValueError(expected)
        if set(data) != {one.name for one in fields(cls)}:
            raise ValueError(expected)
        return cls(**data)


class TrafficLog:
    """What all processes of a session have read, by the second and by the minute.

    Parameters
    ----------
    session : Session, Path or str, optional
        As for :class:`kakehashi.link.Store`.

    Examples
    --------
    >>> log = TrafficLog()  # doctest: +SKIP
    >>> log  # a table  # doctest: +SKIP
    >>> log.save_png("traffic.png")  # doctest: +SKIP
    """

    def __init__(self, session: Session | Path | str | None = None) -> None:
        self.session = Session.of(session)

    def __repr__(self) -> str:
        found = self.summary()
        return f"<TrafficLog of site {found.site}: {found.bytes} bytes, {found.steps} steps>"

    def _repr_html_(self) -> str:
        return site_table([self.summary()])

    def seconds(self, since: int = 0) -> list[Moment]:
        """Return the seconds of the last hour, oldest first, those without anything left out."""
        return self._read(SECOND, since)

    def minutes(self, since: int = 0) -> list[Moment]:
        """Return the minutes of the last week likewise."""
        return self._read(MINUTE, since)

    def outages(self) -> tuple[Outage, ...]:
        """Return the outages of the last hour, oldest first."""
        return outages(self.seconds())

    def summary(self) -> Summary:
        """Return the figures so far."""
        seconds, minutes = self.seconds(), self.minutes()
        rtts = [one.rtt_s for one in seconds if one.rtt_s]
        asked_s = sum(one.asked_s for one in minutes)
        total = sum(one.bytes for one in minutes)
        cuts = outages(seconds)
        # A session that has just begun knows only its running second.
        begin = min((one.at for one in (*seconds[:1], *minutes[:1])), default=0)
        if seconds and minutes and seconds[0].at - minutes[0].at < MINUTE:
            begin = seconds[0].at
        return Summary(
            session=self.session.session,
            site=self.session.site,
            begin=begin,
            end=max((one.at for one in (*seconds[-1:], *minutes[-1:])), default=0),
            bytes=total,
            mean_rate=total / asked_s if asked_s else 0.0,
            best_rate=float(max((one.bytes for one in seconds), default=0)),
            rtt_s=min((one.rtt_s for one in minutes if one.rtt_s), default=None),
            rtt_median_s=statistics.median(rtts) if rtts else None,
            channels=max((one.channels for one in seconds), default=0),
            steps=sum(one.steps for one in minutes),
            waited_s=sum(one.waited_s for one in minutes),
            reconnects=sum(one.reconnects for one in minutes),
            rereads=sum(one.rereads for one in minutes),
            outages=len(cuts),
            outage_s=sum(one.seconds for one in cuts),
        )

    def figure(self) -> Figure:
        """Return traffic, steps and round trip over time, as a figure of matplotlib.

        By the second for a session of up to an hour, else by the minute.
        """
        from kakehashi.link.picture import draw  # noqa: PLC0415 - only who draws needs matplotlib

        return draw(self)

    def save_png(self, path: Path | str, *, dpi: int = 200) -> None:
        """Write :meth:`figure` as PNG."""
        self.figure().savefig(path, format="png", dpi=dpi)

    def _read(self, step: int, since: int) -> list[Moment]:
        since = max(since, int(time.time()) - tally.span(step) + 1)
        own = recorder.of(self.session)
        # What is under way here is not to wait for the next look.
        own.note()
        alone = [] if own.tally.shared else [own.tally]
        for path in self.session.traffic:
            alone += _shown(path).now()
        folder = tally.shared_folder(self.session.session)
        if folder is None:
            return together(alone, step, since)
        with tally.every(folder) as tallies:
            return together([*tallies, *alone], step, since)


class _Shown:
    """What was read below the mounted view: its process shows it in a file there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: list[Tally] = []
        self._thread: threading.Thread | None = None
        self._due = 0.0
        self._lock = threading.Lock()

    def now(self) -> list[Tally]:
        """Return its tally, or the last one known, where there is one."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(
                    target=self._look, name="kakehashi-traffic-view", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    # No further thread can be started.
                    return self._last
                self._thread, self._due = thread, time.monotonic() + _ANSWER_S
            thread, due = self._thread, self._due
        # In a cut all of the view's threads may wait for the store: who asks does not then, and
        # waits but once.
        thread.join(max(0.0, due - time.monotonic()))
        return self._last

    def _look(self) -> None:
        # In a session that ends there is no view any more.
        with contextlib.suppress(OSError):
            found = Tally.of(self._path.read_bytes())
            self._last = [] if found is None else [found]


@functools.cache
def _shown(path: Path) -> _Shown:
    return _Shown(path)


os.register_at_fork(after_in_child=_shown.cache_clear)


def size_text(count: int) -> str:
    """Return a number of bytes for a person to read."""
    for unit, name in ((10**12, "TB"), (10**9, "GB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / MEGABYTE:.1f} MB"


def site_table(summaries: Iterable[Summary]) -> str:
    """Return round trip and bandwidth of each site as an HTML table.

    Parameters
    ----------
    summaries : iterable of Summary
        Of one or several sessions, as :meth:`Summary.load` reads them.
    """
    sites: dict[str, list[Summary]] = {}
    for one in summaries:
        sites.setdefault(one.site, []).append(one)
    head = (
        "Site", "Sessions", "RTT, shortest", "RTT, median", "Mean rate", "Best second", "Read",
        "Steps", "Waited", "Outages",
    )  # fmt: skip
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _row(site, found))}</tr>"
        for site, found in sorted(sites.items())
    )
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>"


def _row(site: str, found: Sequence[Summary]) -> tuple[str, ...]:
    shortest = [one.rtt_s for one in found if one.rtt_s is not None]
    medians = [one.rtt_median_s for one in found if one.rtt_median_s is not None]
    total = sum(one.bytes for one in found)
    asked_s = sum(one.bytes / one.mean_rate for one in found if one.mean_rate)
    cuts, cut_s = sum(one.outages for one in found), sum(one.outage_s for one in found)
    return (
        site,
        str(len(found)),
        f"{1000 * min(shortest):.1f} ms" if shortest else "unknown",
        f"{1000 * statistics.median(medians):.1f} ms" if medians else "unknown",
        f"{total / asked_s / MEGABYTE:.1f} MB/s" if asked_s else "unknown",
        f"{max(one.best_rate for one in found) / MEGABYTE:.1f} MB/s",
        size_text(total),
        str(sum(one.steps for one in found)),
        f"{sum(one.waited_s for one in found):.1f} s",
        f"{cuts} ({cut_s} s)",
    )
