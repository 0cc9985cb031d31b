"""``kakehashi store fsck``, ``backup``, ``restore``, ``quota`` and ``snapshot``."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kakehashi import config as configuration
from kakehashi.cli.service import DEFAULT_CONFIG, ConfigPath
from kakehashi.cli.store import opened
from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
MB = 1_000_000


@contextmanager
def _status() -> Iterator[Callable[[str, int], None]]:
    """Show the rows of the table that is being written."""
    with Console(stderr=True).status("reading") as status:
        yield lambda table, rows: status.update(f"{table}: {rows:,} rows")


class _Bars:
    """How far a check has come, as bars."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self.done = ""

    def at(self, stage: str, done: int, total: int | None, read: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self.done = f"{done} {stage} looked at"
        description = f"{stage} ({read / MB:,.0f} MB read)"
        self._progress.update(
            self._tasks[stage], completed=done, total=total, description=description
        )


def fsck(
    *,
    config: ConfigPath = DEFAULT_CONFIG,
    rate: Annotated[
        float | None, typer.Option(min=0.001, metavar="MB/s", help="Read no faster than this.")
    ] = None,
    series: Annotated[
        list[str] | None, typer.Option("--series", metavar="UID", help="Only these series.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--from-start", help="Go on where the last run was stopped.")
    ] = True,
    repair: Annotated[
        bool, typer.Option("--repair", help="Relink views, remove .part files older than a day.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every pack, row, kept object and view; exit status 1 if something is wrong."""
    from kakehashi.store.fsck import fsck as check

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        opened(config) as (settings, catalogue),
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
    ):
        bars = _Bars(progress)
        try:
            report = check(
                settings,
                catalogue,
                rate=None if rate is None else rate * MB,
                series=series or (),
                resume=resume,
                repair=repair,
                progress=bars,
            )
        except KeyboardInterrupt:
            going_on = "" if series else "; the same command goes on from there"
            typer.echo(f"stopped, {bars.done or 'nothing looked at'}{going_on}", err=True)
            raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        for finding in report.repaired:
            _print(f"repaired       {finding.path}: {finding.what}")
        for finding in report.findings:
            _print(f"{finding.kind:14} {finding.path}: {finding.what}; {finding.todo}")
        for project, count in report.outdated.items():
            _print(
                f"note           the view of {project} is out of date: {count} series were packed "
                f"anew since; `kakehashi store view {project}` gives it the new packs"
            )
        counted = ", ".join(f"{count} {what}" for what, count in report.checked.items())
        waiting = "not judged yet (files younger than an hour, series that wait for the index)"
        young = f"; {report.young} {waiting}" if report.young else ""
        _print(
            f"{len(report.findings)} findings; {counted} looked at since {report.since}, "
            f"{report.read / MB:,.1f} MB read{young}"
        )
    if report.findings:
        raise typer.Exit(1)


def backup(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A folder that is not there.")],
    *,
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Write the record (tables, authority, projects, keys) to a folder, and read it back."""
    from kakehashi.store.backup import backup as make

    with opened(config) as (settings, catalogue), _status() as progress:
        made = make(settings, catalogue, target, progress)
    if as_json:
        typer.echo(json.dumps(asdict(made), ensure_ascii=False))
    else:
        _print_rows(made.rows)
        _print(f"{target}: {made.size / MB:,.1f} MB, written and read back")


def restore(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A backup.")],
    *,
    config: ConfigPath = DEFAULT_CONFIG,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also if the store has a record, which is lost.")
    ] = False,
    without: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ids of people who withdrew since the backup was made, one a line.",
        ),
    ] = None,
) -> None:
    """Put a backup back, all of it or nothing, into a store that is not running."""
    from kakehashi.store.restore import restore as put_back

    try:
        gone = without.read_text(encoding="utf-8").split() if without else []
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{without}: cannot be read ({error}); expected one id a line") from error
    with _status() as progress:
        restored = put_back(
            configuration.load(config), source, replace=replace, without=gone, progress=progress
        )
    _leave_out(configuration.load(config), restored.left_out)
    _print_rows(restored.rows)
    left = f"; {len(restored.left_out)} series left out: withdrawn" if restored.left_out else ""
    _print(
        f"restored{left}. Next: `kakehashi store init`, `kakehashi store fsck`, "
        "`kakehashi store view --all`"
    )


def quota(
    project: Annotated[str | None, typer.Argument(metavar="PROJECT")] = None,
    *,
    config: ConfigPath = DEFAULT_CONFIG,
    limit: Annotated[
        float | None, typer.Option(min=0.001, metavar="GB", help="Set the project's limit.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what work folders take up, and set limits; exit status 1 if one is over its limit."""
    from kakehashi.store.quota import set_limit, usage

    settings = configuration.load(config)
    store = settings.need_store()
    if limit is not None and project is None:
        raise typer.BadParameter("name the project that the limit is for")
    names = [project] if project else sorted(one.id for one in settings.projects)
    if limit is None:
        found = [usage(store, name) for name in names]
    else:
        found = [set_limit(store, name, round(limit * 1e9)) for name in names]
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in found], ensure_ascii=False))
    else:
        for one in found:
            kind = "enforced by the file system" if one.wall else "no wall: only reported"
            limited = f"of {one.limit / 1e9:,.3f} GB ({kind})" if one.limit else "(no limit)"
            warning = f": {one.warning}" if one.warning else ""
            _print(f"{one.project}: {one.size / 1e9:,.3f} GB {limited}, {one.files} files{warning}")
    if any(one.limit is not None and one.size > one.limit for one in found):
        raise typer.Exit(1)


def snapshot(
    project: Annotated[str, typer.Argument(metavar="PROJECT")],
    *,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Keep a project's work folder as it is now, where the file system has snapshots."""
    from kakehashi.store.quota import snapshot as keep

    _print(str(keep(configuration.load(config).need_store(), project)))


def _leave_out(settings: configuration.Config, series: frozenset[str]) -> None:
    """Take who withdrew out of the reports and cohorts that came back."""
    from kakehashi.store.catalogue import Catalogue
    from kakehashi.store.cohorts import Cohorts
    from kakehashi.store.service.reports import Reports

    store = settings.need_store()
    if not (store.root / "service").is_dir():
        return
    catalogue = Catalogue.open(store)
    cohorts, reports = Cohorts.open(store), Reports.open(store)
    try:
        cohorts.withdraw(series)
        for patient in catalogue.withdrawn():
            reports.withdraw((), patient)
    finally:
        for record in (cohorts, reports, catalogue):
            record.close()


def _print_rows(rows: dict[str, int]) -> None:
    for name, count in rows.items():
        _print(f"{count:12,} {name}")


def _print(text: str) -> None:
    # Names of files must not steer the terminal.
    typer.echo("".join(c if c.isprintable() or c == "\n" else "?" for c in text))
