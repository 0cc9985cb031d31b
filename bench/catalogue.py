"""Facets while typing: the index of codes beside DuckDB, SQLite and PostgreSQL, and its growth.

The questions are drawn at run time, each is asked of all in turn, and every cell of every answer
is compared with DuckDB's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.catalogue_peers import (
    COLUMNS,
    FACETS,
    Cells,
    Duck,
    Lite,
    Peer,
    Postgres,
    facets_sql,
    postgres_server,
    read_facets,
)
from bench.figures import Goal, Series, Table, arguments, at_least, at_most, report
from bench.rows import BODY_PARTS, FACILITIES, MAKERS, batches
from kakehashi.store.facets import Index
from kakehashi.store.facets.scan import THREADS
from kakehashi.store.query import TRUE, parse

SIZES = (1_000_000, 10_000_000, 30_000_000)
SLOW_PEERS_TO = 1_000_000
"""Up to here SQLite and PostgreSQL take part; beyond, they take longer than all else together."""
PAGE = 50
LOOKUPS = 3
GOALS_MS = {"facets, narrow": 150.0, "facets, wide": 300.0, "look-up by UID": 5.0}
OWN = "index"


@dataclass(frozen=True)
class Question:
    """What a person has typed and chosen, and what they may see."""

    text: str
    permission: str
    chosen: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The text and the permission in SQL."""
        return f"({self.text}) AND ({self.permission})".replace("==", "=")

    @property
    def conditions(self) -> dict[str, str]:
        """The choices in SQL."""
        return {name: f"{name} IN {listed(values)}" for name, values in self.chosen.items()}

    @property
    def whole(self) -> str:
        """All of it in SQL."""
        return " AND ".join([self.where, *self.conditions.values()])

    def limits(self) -> dict[str, Any]:
        """All of it for the index."""
        return {
            "query": parse(self.text),
            "permission": parse(self.permission),
            "selections": {name: frozenset(values) for name, values in self.chosen.items()},
        }


def listed(values: tuple[str, ...]) -> str:
    return f"({', '.join(repr(value) for value in values)})"


def some(chance: random.Random, values: Any, low: int, high: int) -> tuple[str, ...]:
    return tuple(sorted(chance.sample(list(values), chance.randint(low, high))))


def narrow(chance: random.Random) -> Question:
    """Draw what is typed for a study's cohort, with values chosen in two facets."""
    year = chance.randint(2019, 2023)
    return Question(
        f"modality == 'CT' and orientation == 'axial' and slices >= {chance.randint(24, 120)} "
        f"and thickness <= {chance.choice((1.0, 1.25, 2.0))} "
        f"and study_date >= '{year}-{chance.randint(1, 12):02d}-01' "
        f"and study_date < '{year + chance.randint(1, 3)}-07-01'",
        f"tier <= 2 and facility in {listed(some(chance, FACILITIES, 5, 9))}",
        {
            "vendor": some(chance, MAKERS, 1, 3),
            "body_part": some(chance, BODY_PARTS[:8], 1, 4),
        },
    )


def wide(chance: random.Random) -> Question:
    """Draw the beginning of a search: nearly everything is left."""
    return Question(f"slices >= {chance.randint(2, 40)}", f"tier <= {chance.choice((2, 3))}")


def cells_of(index: Index, question: Question) -> Cells:
    """Ask the index, and lay its answer out as the databases' are."""
    found = index.facets(columns=FACETS, **question.limits())
    cells: Cells = {}
    for name, counts in found.counts.items():
        for value, count in counts:
            text = str(value).lower() if isinstance(value, bool) else value
            cells[name, None if text is None else str(text)] = count
    return cells


def differing(one: dict[Any, int], two: dict[Any, int]) -> int:
    """Return in how many cells two answers differ."""
    return sum(one.get(key) != two.get(key) for key in one.keys() | two.keys())


class Run:
    """All measurements at one size."""

    def __init__(self, index: Index, peers: list[Peer], chance: random.Random) -> None:
        self.index = index
        self.peers = peers
        self.chance = chance
        self.ms: dict[tuple[str, str], list[float]] = {}
        self.cpu_ms: dict[tuple[str, str], list[float]] = {}
        self.wrong: list[int] = []
        self.cells = 0

    def timed(self, kind: str, engine: str, way: Callable[[], Any]) -> Any:
        started, spent = time.perf_counter(), time.process_time()
        answer = way()
        self.ms.setdefault((kind, engine), []).append((time.perf_counter() - started) * 1e3)
        self.cpu_ms.setdefault((kind, engine), []).append((time.process_time() - spent) * 1e3)
        return answer

    def compared(self, expected: dict[Any, int], found: dict[Any, int]) -> None:
        self.cells += len(expected)
        self.wrong.append(differing(expected, found))

    def facets(self, kind: str, question: Question) -> None:
        def own() -> None:
            found.append(self.timed(kind, OWN, lambda: cells_of(self.index, question)))

        def other(peer: Peer) -> None:
            sql = facets_sql(question.where, question.conditions, sets=peer.sets)
            rows = self.timed(kind, peer.name, functools.partial(peer.ask, sql))
            found.append(read_facets(rows, question.conditions, sets=peer.sets))

        found: list[Cells] = []
        ways: list[Callable[[], None]] = [own]
        ways += [functools.partial(other, peer) for peer in self.peers]
        self.chance.shuffle(ways)
        for way in ways:
            way()
        for answer in found[1:]:
            self.compared(found[0], answer)

    def counted(self, kind: str, columns: tuple[str, ...], question: Question) -> None:
        """Ask for combinations of columns: a pivot is one of two."""
        names = ", ".join(columns)
        sql = f"SELECT {names}, count(*) FROM series WHERE {question.whole} GROUP BY {names}"

        def own() -> dict[Any, int]:
            if len(columns) == 2:
                table = self.index.pivot(*columns, **question.limits())
                return {
                    (row, column): count
                    for row, counts in zip(table.rows, table.counts, strict=True)
                    for column, count in zip(table.columns, counts, strict=True)
                    if count
                }
            return dict(self.index.combinations(columns, **question.limits()))

        answer = self.timed(kind, OWN, own)
        for peer in self.peers:
            rows = self.timed(kind, peer.name, functools.partial(peer.ask, sql))
            self.compared({row[:-1]: row[-1] for row in rows}, answer)

    def page(self, question: Question) -> None:
        sql = (
            f"SELECT {', '.join(COLUMNS)} FROM series WHERE {question.whole} "
            f"ORDER BY study_date DESC LIMIT {PAGE}"
        )
        kind = f"page of {PAGE} rows, newest first"
        page = self.timed(
            kind, OWN, lambda: self.index.page(limit=PAGE, columns=COLUMNS, **question.limits())
        )
        days = dict(enumerate(row["study_date"].toordinal() for row in page.rows))
        place = COLUMNS.index("study_date")
        for peer in self.peers:
            rows = self.timed(kind, peer.name, functools.partial(peer.ask, sql))
            if peer.name == Duck.name:
                self.compared({n: row[place].toordinal() for n, row in enumerate(rows)}, days)

    def lookup(self) -> None:
        offset = self.chance.randrange(self.index.rows)
        page = self.index.page(permission=TRUE, order="age", offset=offset, limit=1)
        uid = page.rows[0]["series_uid"]
        kind = "look-up by UID"
        row = self.timed(kind, OWN, lambda: self.index.lookup(uid, permission=TRUE))
        sql = f"SELECT {', '.join(COLUMNS)} FROM series WHERE series_uid = '{uid}'"
        for peer in self.peers:
            rows = self.timed(kind, peer.name, functools.partial(peer.ask, sql))
            self.compared({row["kernel"]: 1}, {rows[0][COLUMNS.index("kernel")]: len(rows)})

    def round(self) -> None:
        small, large = narrow(self.chance), wide(self.chance)
        self.facets("facets, narrow", small)
        self.facets("facets, wide", large)
        self.counted("pivot vendor x facility", ("vendor", "facility"), small)
        self.counted("combinations vendor, model, kernel", ("vendor", "model", "kernel"), large)
        self.page(small)
        for _ in range(LOOKUPS):
            self.lookup()
        # The comparison must see a difference where there is one.
        if not differing(cells_of(self.index, small), cells_of(self.index, large)):
            raise SystemExit("the comparison of answers sees no difference between two questions")


START = """
import json, sys, time
from pathlib import Path
from kakehashi.store.facets import Index
from kakehashi.store.query import parse
imported = time.perf_counter()
index = Index.open(Path(sys.argv[1]))
opened = time.perf_counter()
index.facets(parse(sys.argv[2]), permission=parse(sys.argv[3]), columns=sys.argv[4].split(","))
answered = time.perf_counter()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
own, mapped = (int(status[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
print(json.dumps({
    "open": opened - imported, "first": answered - opened, "own": own, "mapped": mapped,
}))
"""


def start_up(folder: Path, question: Question) -> dict[str, float]:
    """Open the index in a new process, and ask one wide question; seconds and MiB."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", START, str(folder)),
            *(question.text, question.permission, ",".join(FACETS)),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(
    size: int, chance: random.Random, console: Console, stack: contextlib.ExitStack
) -> tuple[Run, tuple[str, ...]]:
    """Fill everything with so many rows and measure; return the run and its line of growth."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kakehashi-facets-")))
    kept = list(batches(size)) if size <= SLOW_PEERS_TO else None

    def rows() -> Iterator[pa.RecordBatch]:
        return batches(size) if kept is None else iter(kept)

    started = time.perf_counter()
    index = Index.create(folder / "index")
    index.add_segment(rows())
    built = time.perf_counter() - started
    console.print(f"  {size:,} rows in the index after {built:.0f} s", style="dim")
    every = index.facets(permission=TRUE, columns=(*FACETS, "orientation"))
    values = {
        name: sorted(value for value, _ in counts if isinstance(value, str))
        for name, counts in every.counts.items()
        if name != "contrast"
    }
    duck = Duck(folder, values, THREADS)
    stack.callback(duck.close)
    peers: list[Peer] = [duck]
    if size <= SLOW_PEERS_TO:
        lite = Lite(folder)
        stack.callback(lite.close)
        peers.append(lite)
        if (host := stack.enter_context(postgres_server())) is not None:
            postgres = Postgres(host)
            stack.callback(postgres.close)
            peers.append(postgres)
    sizes = [sum(path.stat().st_size for path in (folder / "index").rglob("*.bin"))]
    for peer in peers:
        started = time.perf_counter()
        peer.load(rows())
        sizes.append(peer.bytes_on_disk())
        took = time.perf_counter() - started
        console.print(f"  {size:,} rows in {peer.name} after {took:.0f} s", style="dim")
    index.warm()  # as the service does; what was written meanwhile has pushed it out of memory
    run = Run(index, peers[:1], chance)
    run.round()  # everything has been read once
    run.ms.clear()
    run.cpu_ms.clear()
    for number in range(Duck.rounds):
        run.peers = [peer for peer in peers if number < peer.rounds]
        run.round()
        console.print(f"  {number + 1}/{Duck.rounds} at {size:,}", style="dim")
    starts = [start_up(folder / "index", wide(chance)) for _ in range(3)]

    def middle(name: str) -> float:
        return statistics.median(one[name] for one in starts)

    def median(kind: str) -> str:
        return f"{statistics.median(run.ms[kind, OWN]):.1f}"

    line = (
        f"{size:,}",
        f"{built:.0f} s",
        f"{sizes[0] / 1e6:.0f} MB",
        f"{sizes[1] / 1e6:.0f} MB",
        f"{middle('open') * 1e3:.1f} ms",
        f"{middle('first') * 1e3:.0f} ms",
        f"{middle('own'):.0f} + {middle('mapped'):.0f} MiB",
        *(median(kind) for kind in GOALS_MS),
    )
    return run, line


def table_of(size: int, run: Run) -> Table:
    """Lay out the medians of all engines at one size."""
    engines = list(dict.fromkeys(engine for _, engine in run.ms))
    engines.sort(key=(OWN, Duck.name, Lite.name, Postgres.name).index)
    kinds = list(dict.fromkeys(kind for kind, _ in run.ms))
    rows = []
    for kind in kinds:
        own = run.ms[kind, OWN]
        cpu = {name: statistics.median(run.cpu_ms[kind, name]) for name in (OWN, Duck.name)}
        row = [kind, f"{statistics.median(own):.1f} ({min(own):.1f} to {max(own):.1f})"]
        for engine in engines[1:]:
            found = run.ms[kind, engine]
            ratio = statistics.median(b / a for a, b in zip(own, found, strict=False))
            row.append(f"{statistics.median(found):.1f} ({ratio:.1f}x)")
        row.append(f"{cpu[OWN]:.0f}, {cpu[Duck.name]:.0f}")
        rows.append(tuple(row))
    columns = ("", *engines, "CPU ms: index, DuckDB")
    return Table(f"{size:,} series: ms, and how many times the index's", columns, tuple(rows))


def main() -> None:
    """Measure and report."""
    options = arguments("facets, pages and look-ups in the catalogue")
    sizes = SIZES[:1] if options.quick else SIZES
    seed = int.from_bytes(os.urandom(4))
    console = Console(stderr=True)
    console.print(f"  questions drawn with {seed}", style="dim")
    chance = random.Random(seed)
    series: list[Series] = []
    goals: list[Goal] = []
    tables: list[Table] = []
    growth: list[tuple[str, ...]] = []
    cells, wrong = 0, 0
    for size in sizes:
        with contextlib.ExitStack() as stack:
            run, line = measure(size, chance, console, stack)
        growth.append(line)
        tables.append(table_of(size, run))
        cells += run.cells
        wrong += sum(run.wrong)
        for (kind, engine), values in run.ms.items():
            series.append(Series(f"{size:,}: {kind}: {engine}", "ms", tuple(values)))
        for kind in dict.fromkeys(kind for kind, _ in run.ms):
            own = run.ms[kind, OWN]
            if size == sizes[-1] and kind in GOALS_MS:
                goals.append(at_most(f"{size:,}: {kind}", own, GOALS_MS[kind], "ms"))
            pairs = zip(own, run.ms[kind, Duck.name], strict=True)
            ratios = [two / one for one, two in pairs]
            goals.append(at_least(f"{size:,}: {kind}: DuckDB's time of the index's", ratios, 1))
    goals.append(at_most(f"cells of {cells:,} that differ", [float(wrong)], 0, ""))
    tables.append(
        Table(
            "Growth of the index (memory: its own + mapped, after one wide question)",
            (
                *("series", "built", "on disk", "DuckDB's", "opened", "first answer", "memory"),
                *(f"{kind}, ms" for kind in GOALS_MS),
            ),
            tuple(growth),
        )
    )
    report(
        "Catalogue: facets while typing",
        series,
        goals,
        tables=tables,
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
