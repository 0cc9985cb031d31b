"""Going on while the store is shut: what is held in memory meanwhile, and in which order.

A maintenance is announced by the position at which it begins, not by the time, so that the order
is known beforehand and is the same in every run to which the same was announced: within that
epoch, from that position on, first the samples of the pinned series, then all others, each in the
epoch's own order. Every sample still comes once.

    >>> start = position_at(loader, when)  # doctest: +SKIP
    >>> estimate = plan(loader, start, limit_bytes=64 << 30, window_s=7200)  # doctest: +SKIP
    >>> print(estimate)  # doctest: +SKIP
    >>> pins = pin(loader, estimate.maintenance, limit_bytes=64 << 30)  # doctest: +SKIP
    >>> pins.wait()  # doctest: +SKIP
    >>> loader.announce(estimate.maintenance, pins)  # doctest: +SKIP
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kakehashi.link.manifest import series_path
from kakehashi.link.order import Order, Turned
from kakehashi.link.pinned import Pins

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from kakehashi.link.dataset import SeriesLoader
    from kakehashi.link.pinned import PinProgress

MARGIN_S = 300.0


class Position(NamedTuple):
    """A place in a training: an epoch, and a position in it, both from 0."""

    epoch: int
    sample: int


@dataclass(frozen=True)
class Maintenance:
    """What is announced to a loader; the same on every rank.

    Attributes
    ----------
    epoch, sample : int
        The position from which on the order is turned.
    uids : tuple of str
        The series that are pinned, by all ranks together.
    """

    epoch: int
    sample: int
    uids: tuple[str, ...]

    @property
    def start(self) -> Position:
        """Where it begins."""
        return Position(self.epoch, self.sample)


def turned(
    order: Order, uids: Sequence[str], per_series: int, announced: Iterable[Maintenance]
) -> Turned:
    """Return an epoch's order with what was announced for it.

    Parameters
    ----------
    order : Order
        The epoch's own order.
    uids, per_series
        The dataset's series, and the samples that each gives.
    announced : iterable of Maintenance
        What was announced for this epoch, in that order.
    """
    return Turned(
        order,
        (
            (one.sample, _samples(uids, per_series, set(one.uids)))
            for one in announced
            # What holds everything changes no order, however large it is.
            if not holds_all(uids, one)
        ),
    )


def holds_all(uids: Sequence[str], maintenance: Maintenance) -> bool:
    """Tell whether a maintenance holds the whole of a dataset."""
    return set(maintenance.uids).issuperset(uids)


def _samples(uids: Sequence[str], per_series: int, chosen: Collection[str]) -> Iterable[int]:
    return (
        number * per_series + copy
        for number, uid in enumerate(uids)
        if uid in chosen
        for copy in range(per_series)
    )


def position_at(
    loader: SeriesLoader,
    when: dt.datetime,
    *,
    rate: float | None = None,
    now: dt.datetime | None = None,
    margin_s: float = MARGIN_S,
) -> Position:
    """Return where the loop will be at a time, rounded down to a whole step of all ranks.

    Ranks measure different rates: ask on one of them, and give the others its answer.

    Parameters
    ----------
    loader : SeriesLoader
    when : datetime
        With a time zone.
    rate : float, optional
        Samples a second of all ranks together; what the loader measured if not given.
    now : datetime, optional
        The present time.
    margin_s : float
        Seconds to be early by. A loop that is later than it should be when the store shuts has to
        wait for samples that are not pinned; one that is early only begins to use up those
        that are.

    Raises
    ------
    ValueError
        The loop's rate is not known yet, or a time has no zone.
    """
    rate = loader.stats().rate if rate is None else rate
    if rate is None or rate <= 0:
        raise ValueError(
            "the loop's rate is not known before its second batch; give rate= in samples a second"
        )
    now = now or dt.datetime.now(dt.UTC)
    if when.tzinfo is None or now.tzinfo is None:
        raise ValueError("the time must have a zone: datetime(..., tzinfo=...)")
    ahead = max(0, int(((when - now).total_seconds() - margin_s) * rate))
    epoch, done = loader.position
    count, step = len(loader.dataset), loader.batch_size * loader.world
    if ahead < count - done:
        return Position(epoch, done + ahead // step * step)
    further, sample = divmod(ahead - (count - done), max(1, count))
    return Position(epoch + 1 + further, sample // step * step)


@dataclass(frozen=True)
class Estimate:
    """What memory will hold of a maintenance, and what it will not.

    Attributes
    ----------
    maintenance : Maintenance
        What to pin and announce.
    limit_bytes, bytes : int
        Bound of this rank's memory, and what it will hold.
    series, all_series : int
        Series that are pinned by all ranks together, and those of the dataset.
    pinned_bytes, all_bytes : int
        Their packed sizes.
    samples : int or None
        Samples that the loop has in memory from the position on, all ranks together; ``None``
        if that is all of them, epoch after epoch.
    rate : float or None
        Samples a second that the loop takes, if known.
    window_s : float or None
        How long the store is to be shut, if given.
    """

    maintenance: Maintenance
    limit_bytes: int
    bytes: int
    series: int
    all_series: int
    pinned_bytes: int
    all_bytes: int
    samples: int | None
    rate: float | None
    window_s: float | None

    @property
    def lasts_s(self) -> float | None:
        """Seconds for which the loop can go on; infinite if all is held, none if not known."""
        if self.samples is None:
            return math.inf
        return None if not self.rate else self.samples / self.rate

    @property
    def covers(self) -> float | None:
        """Part of the window that this is, from 0 to 1."""
        if self.lasts_s is None or not self.window_s:
            return None
        return min(1.0, self.lasts_s / self.window_s)

    def __str__(self) -> str:
        lines = [
            f"from epoch {self.maintenance.epoch}, sample {self.maintenance.sample} on:",
            f"{self.series} of {self.all_series} series held: {_gb(self.pinned_bytes)}",
            f"memory of this rank: {_gb(self.bytes)}, bound {_gb(self.limit_bytes)}",
        ]
        if self.samples is None:
            lines.append("everything is held: the loop goes on for as long as the store is shut")
        elif self.rate:
            lines.append(
                f"{self.samples} samples at {self.rate:.3g} a second last "
                f"{_time(self.samples / self.rate)}"
            )
        else:
            lines.append(f"{self.samples} samples; how long they last is not known without a rate")
        if self.window_s and self.covers is not None:
            lines.append(f"that is {self.covers:.0%} of the window of {_time(self.window_s)}")
            if self.covers < 1:
                lines.append("then the loop waits for the store, and goes on by itself")
        if self.series < self.all_series:
            lines.append(
                f"not held: {self.all_series - self.series} series, "
                f"{_gb(self.all_bytes - self.pinned_bytes)}"
            )
        return "\n".join(lines)


def plan(
    loader: SeriesLoader,
    start: Position,
    *,
    limit_bytes: int,
    uids: Collection[str] | None = None,
    rate: float | None = None,
    window_s: float | None = None,
) -> Estimate:
    """Choose what to pin, and say beforehand what that covers.

    If all fits, all is pinned. Otherwise series are taken as the epoch's order comes to them,
    not those that are cheapest, which would train on small series first.

    Parameters
    ----------
    loader : SeriesLoader
    start : Position
        Where the maintenance begins.
    limit_bytes : int
        Bound of each rank's memory for packed bytes.
    uids : collection of str, optional
        Series to choose from; all of the dataset if not given.
    rate : float, optional
        Samples a second of all ranks together; what the loader measured if not given.
    window_s : float, optional
        How long the store is to be shut, in seconds.

    Raises
    ------
    ValueError
        The position lies behind the loop or what was announced, or is not in the epoch; or the
        dataset lacks one of the series.
    """
    dataset = loader.dataset
    wanted = set(dataset.uids) if uids is None else set(uids)
    refuse(loader, Maintenance(*start, tuple(wanted)))
    sizes = _sizes(loader)
    rest = _Rest(loader, start)
    chosen = [uid for uid in dict.fromkeys(dataset.uids) if uid in wanted]
    if sum(sizes[uid] for uid in chosen) > limit_bytes:
        chosen = rest.fitting(wanted, sizes, limit_bytes)
    maintenance = Maintenance(start.epoch, start.sample, tuple(chosen))
    everything = bool(chosen) and holds_all(dataset.uids, maintenance)
    return Estimate(
        maintenance=maintenance,
        limit_bytes=limit_bytes,
        bytes=sum(sizes[uid] for uid in rest.share(chosen, loader.rank)),
        series=len(chosen),
        all_series=len(sizes),
        pinned_bytes=sum(sizes[uid] for uid in chosen),
        all_bytes=sum(sizes.values()),
        samples=None if everything else len(rest.held(chosen)),
        rate=loader.stats().rate if rate is None else rate,
        window_s=window_s,
    )


def pin(
    loader: SeriesLoader,
    maintenance: Maintenance,
    *,
    limit_bytes: int,
    progress: Callable[[PinProgress], None] | None = None,
) -> Pins:
    """Begin to fetch this rank's share of a maintenance into memory, in the background.

    Parameters
    ----------
    loader : SeriesLoader
        The loader that it will be announced to.
    maintenance : Maintenance
        The same on every rank. Of a whole dataset every rank holds all; otherwise it holds what
        its own samples of that epoch need.
    limit_bytes : int
        Bound in bytes. The reader's few MB under way come on top until all is held.
    progress : callable, optional
        Called after each series, in another thread.

    Raises
    ------
    ValueError
        It is more than the bound, or could not be announced; nothing is fetched.
    SessionError
        The session has no lease.
    """
    if maintenance not in loader.announced:
        refuse(loader, maintenance)
    sizes = _sizes(loader)
    uids = _Rest(loader, maintenance.start).share(maintenance.uids, loader.rank)
    total = sum(sizes[uid] for uid in uids)
    if total > limit_bytes:
        raise ValueError(
            f"this rank's share is {total} bytes ({_gb(total)}), the bound is {limit_bytes} "
            f"({_gb(limit_bytes)}); plan() chooses what fits"
        )
    return Pins(loader.dataset._stores, uids, progress=progress)


def refuse(loader: SeriesLoader, maintenance: Maintenance) -> None:
    """Raise what a new maintenance is refused for.

    Raises
    ------
    ValueError
        It begins where the loop or what was announced has passed, or its series are not there.
    """
    count = len(loader.dataset)
    least = loader.position
    for one in loader.announced:
        # Of two from the same position on it could not be told later which turned which.
        least = max(least, Position(one.epoch, one.sample + 1))
    if least.sample >= count:
        least = Position(least.epoch + 1, 0)
    if maintenance.start < least or not 0 <= maintenance.sample < count:
        raise ValueError(
            f"a maintenance can begin from {tuple(least)} on, at samples 0 to {count - 1} of an "
            f"epoch; got {tuple(maintenance.start)}"
        )
    if unknown := set(maintenance.uids).difference(loader.dataset.uids):
        raise ValueError(f"the dataset has no series {min(unknown)!r}")


class _Rest:
    """What is left of an epoch from a position on, in the order before the maintenance."""

    def __init__(self, loader: SeriesLoader, start: Position) -> None:
        dataset = loader.dataset
        order = loader.order(start.epoch, before=start)
        self._uids = dataset.uids
        self._world = loader.world
        per_series = dataset.per_series
        self._rest = [
            dataset.uids[order.sample(at) // per_series] for at in range(start.sample, len(dataset))
        ]
        # Ranks take positions in turn, from where they stood when they began with the epoch.
        epoch, done = loader.position
        self._passed = (done if epoch == start.epoch else 0) - start.sample

    def held(self, chosen: Collection[str]) -> list[str]:
        """Return the series of the samples that are held, in their order."""
        among = set(chosen)
        return [uid for uid in self._rest if uid in among]

    def share(self, chosen: Collection[str], rank: int) -> list[str]:
        """Return what a rank holds, in the order in which it will be needed."""
        if set(chosen).issuperset(self._uids):
            return list(dict.fromkeys([*self._rest, *self._uids]))
        held = self.held(chosen)
        # What a training has behind it when it is resumed in the middle is not needed any more.
        first = self._passed + rank
        return list(
            dict.fromkeys(held[first if self._passed > 0 else first % self._world :: self._world])
        )

    def fitting(self, wanted: Collection[str], sizes: Mapping[str, int], limit: int) -> list[str]:
        """Return as many series, in their order, as every rank has room for."""
        order = list(dict.fromkeys(self.held(wanted)))

        def fits(count: int) -> bool:
            return all(
                sum(sizes[uid] for uid in self.share(order[:count], rank)) <= limit
                for rank in range(self._world)
            )

        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return order[:low]


def _sizes(loader: SeriesLoader) -> dict[str, int]:
    files = loader.dataset._stores.get().reader.manifest.files
    return {uid: files[series_path(uid)].size for uid in loader.dataset.uids}


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"


def _time(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"
