"""A session's traffic as a figure for papers; drawn without a screen."""

from __future__ import annotations

import datetime as dt
import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kakehashi.link.tally import MINUTE, SECOND, Moment
from kakehashi.link.traffic import MEGABYTE, OUTAGE_S, outages, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from kakehashi.link.traffic import Summary, TrafficLog

# Told apart also by those who do not see red and green apart, and in print without colour.
TRAFFIC, STEPS, WAIT, RTT, OUTAGE = "#0072b2", "#009e73", "#e69f00", "#555555", "#d55e00"
_HOUR_S = 3600


def draw(log: TrafficLog) -> Figure:
    """Return the figure of a log."""
    summary = log.summary()
    step = SECOND if summary.end - summary.begin < _HOUR_S - 1 else MINUTE
    moments = log.seconds() if step == SECOND else log.minutes()
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 1))
    begin = summary.begin - summary.begin % step
    unit_s, unit = (60, "minutes") if summary.end - begin >= 300 else (1, "seconds")
    if step == MINUTE and summary.end - begin >= 6 * _HOUR_S:
        unit_s, unit = _HOUR_S, "hours"
    dense = _dense(moments, begin, step)
    edges = np.arange(len(dense) + 1) * step / unit_s
    _rate(top, dense, edges, step)
    _steps(middle, dense, edges, step)
    _rtt(bottom, dense, edges)
    if step == SECOND:
        for cut in outages(moments):
            for axes in (top, middle, bottom):
                axes.axvspan(
                    (cut.begin - begin) / unit_s,
                    (cut.end - begin) / unit_s,
                    color=OUTAGE,
                    alpha=0.25,
                    linewidth=0,
                    label=f"nothing came for {OUTAGE_S} s or more, though asked for",
                )
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, edges[-1])
    _legend(figure)
    bottom.set_xlabel(f"{unit} since {_time(begin)}")
    _words(figure, log, summary, step)
    return figure


def _dense(moments: Sequence[Moment], begin: int, step: int) -> list[Moment]:
    """Return a moment for each second or minute, also for those without anything."""
    known = {one.at: one for one in moments}
    last = max(known, default=begin)
    return [known.get(at, Moment(at)) for at in range(begin, last + 1, step)]


def _rate(axes: Axes, dense: Sequence[Moment], edges: NDArray[np.float64], step: int) -> None:
    rates = [one.bytes / step / MEGABYTE for one in dense]
    axes.stairs(rates, edges, fill=True, color=TRAFFIC, alpha=0.35)
    axes.stairs(rates, edges, color=TRAFFIC, linewidth=1, label="read from the store")
    lost = [(left, one) for left, one in zip(edges[:-1], dense, strict=True) if one.reconnects]
    if lost:
        axes.plot(
            [left for left, _ in lost],
            [0] * len(lost),
            linestyle="",
            marker="^",
            markersize=5,
            color=OUTAGE,
            clip_on=False,
            label="a channel was lost, or not opened",
        )
    axes.set_ylabel("MB/s")
    axes.set_ylim(0, max([*rates, 1e-3]) * 1.15)


def _steps(axes: Axes, dense: Sequence[Moment], edges: NDArray[np.float64], step: int) -> None:
    steps = [one.steps / step for one in dense]
    axes.stairs(steps, edges, fill=True, color=STEPS, alpha=0.3)
    axes.stairs(steps, edges, color=STEPS, linewidth=1, label="batches")
    axes.set_ylabel("batches/s")
    axes.set_ylim(0, max([*steps, 1e-3]) * 1.15)
    waits = axes.twinx()
    waits.stairs(
        [100 * one.waited_s / step for one in dense],
        edges,
        fill=True,
        color=WAIT,
        alpha=0.5,
        label="loop waits for its batch",
    )
    waits.set_ylabel("waiting, %")
    waits.set_ylim(0, max(100.0, *(100 * one.waited_s / step for one in dense)) * 1.02)
    waits.spines["top"].set_visible(False)
    axes.set_zorder(waits.get_zorder() + 1)
    axes.patch.set_visible(False)


def _rtt(axes: Axes, dense: Sequence[Moment], edges: NDArray[np.float64]) -> None:
    known = [1000 * one.rtt_s if one.rtt_s else np.nan for one in dense]
    axes.stairs(known, edges, color=RTT, linewidth=1, baseline=None, label="shortest round trip")
    axes.set_ylabel("ms")
    axes.set_ylim(0, max((one for one in known if not math.isnan(one)), default=1.0) * 1.4)


def _legend(figure: Figure) -> None:
    """Name everything once, above the plots and not over them."""
    known: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    figure.axes[0].legend(
        list(known.values()),
        list(known),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        fontsize=8,
        frameon=False,
        ncols=3,
    )


def _words(figure: Figure, log: TrafficLog, summary: Summary, step: int) -> None:
    session = log.session
    figure.suptitle(
        f"Site {summary.site}, project {session.project}: read from the store", fontsize=12
    )
    every = "second" if step == SECOND else "minute"
    mean, best = summary.mean_rate / MEGABYTE, summary.best_rate / MEGABYTE
    first = (
        f"{size_text(summary.bytes)} read, mean {mean:.1f} MB/s while bytes were asked "
        f"for, best second {best:.1f} MB/s; {summary.steps} batches, {summary.waited_s:.1f} s "
        f"waited; {summary.reconnects} channels lost; outages: {summary.outages} "
        f"({summary.outage_s} s)"
    )
    second = (
        f"By the {every}, from {_time(summary.begin)} to {_time(summary.end)}. Counted: "
        "verified bytes read by this session's processes and for its mounted view."
    )
    third = (
        "Not counted: what was written, and what sshfs read where that is the view. "
        "Best second and outages: of the last hour."
    )
    lines = (first, second, third)
    figure.supxlabel("\n".join(lines), fontsize=7.5, color="#444444", ha="center")


def _time(at: int) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
