"""What every benchmark shares: repeated, interleaved measurement, bounds, table and JSON."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console
from rich.table import Table as Screen

RESAMPLES = 4000


@dataclass(frozen=True)
class Series:
    """One measured quantity over its runs."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Goal:
    """What was asked, and whether the 95 % bound on the bad side meets it."""

    name: str
    value: float
    low: float
    high: float
    goal: str
    met: bool


@dataclass(frozen=True)
class Table:
    """Figures laid out for the page, where one row for each quantity would be too long."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Document(TypedDict):
    """The file that :func:`report` writes."""

    title: str
    quick: bool
    measured_at: str
    machine: dict[str, Any]
    cpu_seconds: float
    series: list[dict[str, Any]]
    goals: list[dict[str, Any]]
    tables: list[dict[str, Any]]


def let_pass(seconds: float) -> None:
    """Let time pass: what is measured goes on meanwhile, in other threads and processes."""
    time.sleep(seconds)


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap bounds of the median."""
    chance = random.Random(1)
    medians = sorted(
        statistics.median(chance.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def at_most(name: str, values: Sequence[float], limit: float, unit: str) -> Goal:
    """State a goal that a quantity's median must not exceed."""
    low, high = bounds(values)
    return Goal(name, statistics.median(values), low, high, f"<= {limit:g} {unit}", high <= limit)


def at_least(name: str, values: Sequence[float], limit: float) -> Goal:
    """State a goal that a quantity's median must reach."""
    low, high = bounds(values)
    return Goal(name, statistics.median(values), low, high, f">= {limit:g}", low >= limit)


def interleaved(
    ways: Mapping[str, Callable[[], float]], rounds: int, console: Console
) -> dict[str, tuple[float, ...]]:
    """Run the ways in turn, in an order that changes each round; return each way's values."""
    values: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for number in range(rounds):
        for name in order:
            values[name].append(ways[name]())
            console.print(f"  {number + 1}/{rounds} {name}: {values[name][-1]:.2f}", style="dim")
        order.reverse()
    return {name: tuple(found) for name, found in values.items()}


def machine() -> dict[str, object]:
    """Say what the figures were measured on."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its ended children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def arguments(description: str) -> argparse.Namespace:
    """Parse the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def all_of(title: str, series: Sequence[Series]) -> Table:
    """Lay out every quantity by itself."""
    return Table(
        title,
        ("quantity", "median", "min", "max", "runs"),
        tuple(
            (
                item.name,
                f"{item.median:.3g} {item.unit}",
                f"{min(item.values):.3g}",
                f"{max(item.values):.3g}",
                str(len(item.values)),
            )
            for item in series
        ),
    )


def report(
    title: str,
    series: Sequence[Series],
    goals: Sequence[Goal],
    *,
    quick: bool,
    path: Path | None,
    tables: Sequence[Table] = (),
) -> None:
    """Print the tables, and write the same as JSON where asked.

    Without ``tables`` there is one of all the series.
    """
    console = Console(width=110)
    shown = tables or [all_of(title, series)]
    for table in shown:
        screen = Screen(title=table.title)
        for number, column in enumerate(table.columns):
            screen.add_column(column, justify="right" if number else "left")
        for row in table.rows:
            screen.add_row(*row)
        console.print(screen)
    for goal in goals:
        console.print(
            f"{'met' if goal.met else 'NOT MET'}: {goal.name}: {goal.value:.3g} "
            f"[{goal.low:.3g}, {goal.high:.3g}], goal {goal.goal}",
            markup=False,
        )
    where = machine()
    console.print(f"on {where}; {cpu_seconds():.1f} CPU seconds of the benchmark's own")
    if path is not None:
        document: Document = {
            "title": title,
            "quick": quick,
            "measured_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "machine": where,
            "cpu_seconds": round(cpu_seconds(), 1),
            "series": [asdict(item) | {"median": item.median} for item in series],
            "goals": [asdict(goal) for goal in goals],
            "tables": [asdict(table) for table in shown],
        }
        path.write_text(json.dumps(document, indent=2) + "\n")
