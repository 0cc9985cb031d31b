"""Ways in turn: each round measures every way once, over the link and from this node's memory."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kakehashi.errors import KakehashiError, LinkClosedError
from kakehashi.link.bench.results import Figure, NotMeasured, Part, without_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kakehashi.link.bench.sample import Sample

# torch says so (RuntimeError) when an accelerator's memory is too small.
FAILURES = (KakehashiError, OSError, RuntimeError, ValueError)


Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Quantity:
    """Something that is measured."""

    name: str
    unit: str
    better: Better = "higher"


@dataclass(frozen=True)
class Way:
    """One run that gives one or several quantities.

    Attributes
    ----------
    quantities : tuple of Quantity
    link : callable
        Measures them over the link, once.
    local : callable or None
        Measures the same from memory, once.
    """

    quantities: tuple[Quantity, ...]
    link: Callable[[], Sequence[float]]
    local: Callable[[], Sequence[float]] | None = None

    @property
    def name(self) -> str:
        """What it is called."""
        return self.quantities[0].name


def one(
    name: str,
    unit: str,
    link: Callable[[], float],
    local: Callable[[], float] | None = None,
    better: Better = "higher",
) -> Way:
    """Return a way with one quantity."""
    return Way(
        (Quantity(name, unit, better),),
        lambda: (link(),),
        None if local is None else lambda: (local(),),
    )


@dataclass(frozen=True)
class Settings:
    """How long and how often.

    Attributes
    ----------
    rounds : int
    seconds : float
        Of one measurement of a rate.
    compute_s : float
        What a batch's emulated compute takes.
    batches : int
        Batches of one run of a training.
    bytes : int
        What is read again and again, and held in memory for comparison, at most.
    write_bytes : int
        What is written into the work folder at once.
    quick : bool
    """

    rounds: int = 5
    seconds: float = 2.0
    compute_s: float = 0.8
    batches: int = 16
    bytes: int = 1 << 30
    write_bytes: int = 64 << 20
    quick: bool = False

    @classmethod
    def chosen(cls, *, quick: bool, compute_s: float) -> Settings:
        """Return the usual ones, or those that end within some minutes on a slow node, too."""
        if quick:
            return cls(2, 1.0, compute_s, 4, 128 << 20, 8 << 20, quick=True)
        return cls(compute_s=compute_s)


@dataclass
class Book:
    """What was found so far; it can be read at any moment, also when a part was stopped.

    Parameters
    ----------
    sample : Sample
        What is read.
    settings : Settings
    """

    sample: Sample
    settings: Settings
    figures: list[Figure] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)

    def tell(self, words: str) -> None:
        """Show progress."""
        sys.stderr.write(f"{words}\n")
        sys.stderr.flush()

    def lacks(self, what: str, why: str) -> None:
        """Note what is not measured."""
        self.not_measured.append(NotMeasured(what=what[:300], why=without_names(why)))
        self.tell(f"  not measured: {what}: {without_names(why)}")

    def measure(self, part: Part, ways: Sequence[Way]) -> None:
        """Measure ways in turn, in an order that changes each round.

        One that fails is left out from then on, and noted.
        """
        found: dict[str, list[tuple[Sequence[float], Sequence[float]]]]
        found = {way.name: [] for way in ways}
        order = list(ways)
        try:
            for number in range(self.settings.rounds):
                for way in list(order):
                    try:
                        found[way.name].append(_both(way, swap=number % 2 == 1))
                    except LinkClosedError:
                        raise
                    except FAILURES as error:
                        order.remove(way)
                        self.lacks(way.name, f"{type(error).__name__}: {error}")
                    else:
                        self._show(number + 1, way, found[way.name][-1])
                order.reverse()
        finally:
            for way in ways:
                for at, quantity in enumerate(way.quantities):
                    rounds = found[way.name]
                    if rounds:
                        self.add(
                            part,
                            quantity,
                            [far[at] for far, _ in rounds],
                            [near[at] for _, near in rounds if near],
                        )

    def add(
        self, part: Part, quantity: Quantity, values: Sequence[float], local: Sequence[float] = ()
    ) -> None:
        """Add a figure."""
        self.figures.append(
            Figure(
                part=part,
                name=quantity.name,
                unit=quantity.unit,
                values=tuple(values),
                local=tuple(local),
                better=quantity.better,
            )
        )

    def _show(self, number: int, way: Way, found: tuple[Sequence[float], Sequence[float]]) -> None:
        far, near = found
        for at, quantity in enumerate(way.quantities):
            beside = f", local {near[at]:.4g}" if near else ""
            words = f"{quantity.name}: {far[at]:.4g} {quantity.unit}{beside}"
            self.tell(f"  {number}/{self.settings.rounds} {words}")


def _both(way: Way, *, swap: bool) -> tuple[Sequence[float], Sequence[float]]:
    if way.local is None:
        return way.link(), ()
    if swap:
        near = way.local()
        return way.link(), near
    return way.link(), way.local()


def timed(act: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    started = time.monotonic()
    act()
    return time.monotonic() - started
