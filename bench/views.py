"""Views of many series: built anew, built again, with some more, and taken away.

The packs are a few bytes each, since a view never reads what is in them. Before each way is timed
the files' names are in memory, as they are on a store that is in use.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from rich.console import Console

# Run as a script, this folder is on the path but not its parent.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.figures import Series as Figures
from bench.figures import arguments, report
from kakehashi.config import Config
from kakehashi.store.catalogue import Catalogue, Series
from kakehashi.store.layout import Layout, blocks_path
from kakehashi.store.view import build_view, remove_view

ROUNDS = 3
MANY, FEW, MORE = 100_000, 10_000, 100
PROJECT = "all"
TITLE = "Views"
WAYS = ("built anew", "nothing changed", f"{MORE} more", "taken away")


def row(number: int, layout: Layout) -> Series:
    """Describe a series that is not one."""
    uid = f"1.2.840.99999.{number}"
    content = uid.encode()
    return Series(
        series_uid=uid,
        study_uid=f"1.2.840.88888.{number // 3}",
        patient_id=f"P{number // 6:08}",
        modality="CT",
        body_part="CHEST",
        manufacturer="MAKER",
        vendor="MAKER",
        model="MODEL",
        kernel="FC51",
        description="Chest 1.0",
        study_date=dt.date(2024, 2, 29),
        rows=512,
        columns=512,
        slices=300,
        volumes=1,
        usable_3d=True,
        spacing_z=1.0,
        spacing_y=0.75,
        spacing_x=0.75,
        thickness=1.0,
        orientation="axial",
        kvp=120.0,
        exposure=80.0,
        contrast=False,
        sex="F",
        age=61.0,
        transfer_syntax="1.2.840.10008.1.2.1",
        flags=(),
        facility="F01",
        tier=1,
        path=layout.relative(layout.pack(uid)),
        size=len(content),
        blocks=hashlib.sha256(hashlib.sha256(content).digest()).hexdigest(),
        added_at="2026-01-01T00:00:00Z",
    )


def fill(layout: Layout, catalogue: Catalogue, numbers: range) -> None:
    """Make packs of a few bytes, and their rows."""
    for number in range(256):
        (layout.packs / f"{number:02x}").mkdir(parents=True, exist_ok=True)
    values = []
    for number in numbers:
        series = row(number, layout)
        pack = layout.absolute(series.path)
        pack.write_bytes(series.series_uid.encode())
        blocks_path(pack).write_bytes(hashlib.sha256(series.series_uid.encode()).digest())
        values.append(dataclasses.asdict(series) | {"flags": []})
    engine = catalogue._engine  # one transaction, where the catalogue has one for each row
    table = sa.Table("series", sa.MetaData(), autoload_with=engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(table), values)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def main() -> None:
    """Measure and report."""
    options = arguments("views of many series")
    count, rounds = (FEW, 1) if options.quick else (MANY, ROUNDS)
    console = Console()
    values: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(prefix="kakehashi-views-") as folder:
        root = Path(folder)
        project = {
            "id": PROJECT, "title": PROJECT, "purpose": "bench", "approval": "1",
            "expires": "2099-01-01", "groups": ["g"], "sites": ["s"],
        }  # fmt: skip
        config = Config.model_validate(
            {"store": {"root": folder, "address": "store.example"}, "projects": [project]}
        )
        catalogue = Catalogue.open(config.need_store())
        try:
            fill(Layout(root), catalogue, range(count))
            for number in range(rounds):
                build = [
                    lambda: build_view(config, PROJECT, catalogue),
                    lambda: build_view(config, PROJECT, catalogue),
                ]
                taken = [timed(work) for work in build]
                first = count + number * MORE
                fill(Layout(root), catalogue, range(first, first + MORE))
                taken.append(timed(build[0]))
                os.sync()  # else what was written meanwhile is counted as the removal's
                taken.append(timed(lambda: remove_view(config, PROJECT)))
                for name, seconds in zip(WAYS, taken, strict=True):
                    values[name].append(seconds)
                    console.print(f"  {number + 1}/{rounds} {name}: {seconds:.2f} s", style="dim")
        finally:
            catalogue.close()
    report(
        f"{TITLE} of {count:,} series",
        [Figures(name, "s", tuple(found)) for name, found in values.items()],
        [],
        quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
