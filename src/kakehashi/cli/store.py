"""``kakehashi store``: take data in, and see what is there."""

from __future__ import annotations

import json
import logging
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kakehashi import config as configuration
from kakehashi.errors import StoreError

# numpy, zarr, pydicom and the database are imported where they are used: hub and node run
# the command line without them.
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kakehashi.store.catalogue import Catalogue, Kept, Series
    from kakehashi.store.view import ViewBuilt

app = typer.Typer(help="The store: packed series, catalogue, views.", no_args_is_help=True)

ConfigOption = Annotated[
    Path, typer.Option("--config", envvar="KAKEHASHI_CONFIG", help="The deployment's settings.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_CONFIG = Path("/etc/kakehashi.toml")


@contextmanager
def opened(path: Path) -> Iterator[tuple[configuration.Config, Catalogue]]:
    """Give a configuration and its catalogue, which is closed at the end."""
    from kakehashi.store.catalogue import Catalogue

    config = configuration.load(path)
    catalogue = Catalogue.open(config.need_store())
    try:
        yield config, catalogue
    finally:
        catalogue.close()


class _Bars:
    """The progress of adding, as bars."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def _show(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)

    def files(self, done: int, total: int) -> None:
        self._show("files read", done, total)

    def series(self, done: int, total: int) -> None:
        self._show("series", done, total)

    def slices(self, done: int, total: int) -> None:
        self._show("slices of this series", done, total)


@app.command()
def add(
    sources: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders or files with DICOM data.")
    ],
    *,
    facility: Annotated[str, typer.Option(help="The hospital that they are from.")] = "",
    tier: Annotated[
        int, typer.Option(min=1, max=3, help="How much of the person they may still show.")
    ] = 1,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Pack DICOM series into the store; keep what cannot be packed, with the reason.

    It can be interrupted and repeated: series that are complete stay, and what is in the
    store already is left alone.
    """
    from kakehashi.store.indexing import catch_up, enter
    from kakehashi.store.indexing import opened as open_index
    from kakehashi.store.ingest import Origin
    from kakehashi.store.ingest import add as add_files

    origin = Origin(facility, tier)

    # Odd attributes are the senders'; they come back as they were, and concern nobody here.
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        opened(config) as (settings, catalogue),
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
    ):
        store, bars = settings.need_store(), _Bars(progress)
        report = add_files(store, catalogue, sources, bars, origin=origin)
        found = open_index(store)
        enter(store, catalogue, found, report.packed)
        catch_up(store, catalogue, found, bars.series)
    for path in report.skipped:
        _print(f"skipped  {path}: not a plain file")
    if report.withdrawn:
        _print(f"left out {len(report.withdrawn)} files of people who withdrew")
    for reason, count in Counter(kept.reason for kept in report.kept).items():
        _print(f"kept     {count} x {reason}")
    for row in report.packed:
        _print(f"packed   {row.series_uid}: {_summary(row)}")
    _print(
        f"{len(report.packed)} series packed, {len(report.unchanged)} were there already, "
        f"{len(report.kept)} objects kept"
    )


@app.command()
def index(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Bring the index of facets up to the catalogue, and make it where there is none."""
    from kakehashi.store.indexing import catch_up
    from kakehashi.store.indexing import opened as open_index

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        opened(config) as (settings, catalogue),
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
    ):
        bars = _Bars(progress)
        found = open_index(settings.need_store())
        changed = catch_up(settings.need_store(), catalogue, found, bars.series)
    _print(f"{changed.entered} series added, {changed.removed} removed, {found.rows} in the index")


@app.command("list")
def list_(
    *,
    config: ConfigOption = DEFAULT_CONFIG,
    kept: Annotated[
        bool, typer.Option("--kept", help="What could not be packed, with the reason.")
    ] = False,
    modality: Annotated[str | None, typer.Option(help="Only this modality, e.g. CT.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the series of the catalogue, or the kept objects."""
    with opened(config) as (_, catalogue):
        rows: list[Series] | list[Kept] = (
            catalogue.list_kept(modality=modality)
            if kept
            else catalogue.list_series(modality=modality)
        )
        if as_json:
            _print_json([row.as_json() for row in rows])
        elif kept:
            _print_kept(catalogue.list_kept(modality=modality))
        else:
            _print_series(catalogue.list_series(modality=modality))


@app.command()
def show(
    uid: Annotated[str, typer.Argument(metavar="UID", help="SeriesInstanceUID.")],
    *,
    config: ConfigOption = DEFAULT_CONFIG,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every block with its hash.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a series: its row, its geometry, and the kept objects that belong to it."""
    from kakehashi.imaging.ozip import FileReader, open_pack
    from kakehashi.store.layout import Layout, damaged_blocks

    with opened(config) as (settings, catalogue):
        row, kept = catalogue.series(uid), catalogue.kept_about_series(uid)
    if row is None and not kept:
        raise StoreError(f"no series {uid!r} in the store; `kakehashi store list` shows all")
    result: dict[str, Any] = {
        "series": row and row.as_json(),
        "kept": [item.as_json() for item in kept],
    }
    damaged: list[int] = []
    if row is not None:
        path = Layout(settings.need_store().root).absolute(row.path)
        if check:
            damaged = damaged_blocks(path, row.blocks)
            result["damaged_blocks"] = damaged
        if not damaged:
            with FileReader(path) as reader:
                pack = open_pack(reader)
            result["geometry"] = {
                "shape": [row.slices, row.rows, row.columns],
                "spacing_mm": list(pack.spacing_mm),
                "affine_lps": pack.affine_lps.tolist(),
                "rescale": pack.rescale.to_meta(),
            }
    if as_json:
        _print_json(result)
    else:
        _print_details(result)
    if damaged:
        raise StoreError(
            f"{len(damaged)} block(s) of the pack of {uid} are damaged: {damaged[:8]}; restore "
            "the pack from a backup"
        )


@app.command()
def view(
    project: Annotated[str | None, typer.Argument(metavar="PROJECT")] = None,
    *,
    config: ConfigOption = DEFAULT_CONFIG,
    every: Annotated[bool, typer.Option("--all", help="The views of all projects.")] = False,
) -> None:
    """Build or bring up to date what a project's account sees."""
    from kakehashi.store.view import build_view

    if every == (project is not None):
        raise typer.BadParameter("name one project, or give --all")
    with opened(config) as (settings, catalogue):
        names = [project] if project is not None else [p.id for p in settings.projects]
        for name in names:
            built = build_view(settings, name, catalogue)
            _print(_view_line(built))


def _view_line(built: ViewBuilt) -> str:
    cohort = built.cohort
    return (
        f"{cohort.project}: {len(cohort.series)} series (cohort version {cohort.version}), "
        f"{built.linked} new, {built.removed} gone; manifest {built.manifest_sha256}"
    )


def _print(text: str) -> None:
    # Texts of DICOM files must not steer the terminal.
    typer.echo("".join(c if c.isprintable() or c == "\n" else "?" for c in text))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def _summary(row: Series) -> str:
    size = f"{row.columns}x{row.rows}x{row.slices}"
    spacing = f"{row.spacing_x:.3g}x{row.spacing_y:.3g}x{row.spacing_z:.3g} mm"
    flags = f" [{', '.join(row.flags)}]" if row.flags else ""
    return f"{row.modality} {size}, {spacing}{flags}"


def _columns(header: list[str], rows: list[list[object]]) -> None:
    """Print aligned columns; a UID is never broken, so that it can be copied and searched."""
    cells = [header, *([("" if v is None else str(v)) for v in row] for row in rows)]
    widths = [max(cell_len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        line = (
            text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)
        )
        _print("  ".join(line).rstrip())


def _print_series(rows: list[Series]) -> None:
    _columns(
        ["series", "image", "body part", "description", "date", "manufacturer"],
        [
            [
                row.series_uid,
                _summary(row),
                row.body_part,
                row.description,
                row.study_date,
                row.manufacturer,
            ]
            for row in rows
        ],
    )


def _print_kept(rows: list[Kept]) -> None:
    _columns(
        ["object", "modality", "refers to", "path", "reason"],
        [
            [row.sop_uid, row.modality, " ".join(row.refers_to), row.path, row.reason]
            for row in rows
        ],
    )


def _print_details(result: dict[str, Any]) -> None:
    for name, value in (result["series"] or {}).items():
        if value not in (None, []):
            _print(f"{name:16} {', '.join(value) if isinstance(value, list) else value}")
    if geometry := result.get("geometry"):
        rows = geometry["affine_lps"][:3]
        _print("affine (LPS, mm) " + "\n                 ".join(_numbers(row) for row in rows))
        _print(f"rescale          {json.dumps(geometry['rescale'], ensure_ascii=False)}")
    for item in result["kept"]:
        _print(f"kept             {item['modality'] or '-'} {item['path']}: {item['reason']}")
    if result.get("damaged_blocks") == []:
        _print("blocks           all as hashed")


def _numbers(row: list[float]) -> str:
    return " ".join(f"{value:12.6f}" for value in row)
