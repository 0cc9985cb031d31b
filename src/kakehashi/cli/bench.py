"""``kakehashi bench``: what a link carries, from inside a session or for a site's operators."""

from __future__ import annotations

import datetime as dt
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from kakehashi.cli.verify import lab_deployment, load_plan
from kakehashi.errors import ConfigError

if TYPE_CHECKING:
    from kakehashi.link.bench.report import Study
    from kakehashi.link.bench.results import Part
    from kakehashi.verify.canary import Deployment

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure."""


@app.command("link")
def link(
    *,
    site: Annotated[
        str | None,
        typer.Option(help="Measure in sessions at this site; without it, in this session."),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(
            help="TOML file as for verify-site; several (of several persons) are measured at once."
        ),
    ] = None,
    lab: Annotated[bool, typer.Option("--lab", help="The lab of the repository.")] = False,
    iperf3: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Also plain TCP from here to this host's iperf3."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter rounds.")] = False,
    compute: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Emulated compute of a batch.")
    ] = 0.8,
    part: Annotated[
        list[str] | None,
        typer.Option(help="Only this part; may be given several times."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", file_okay=False, help="Where the report goes."),
    ] = None,
) -> None:
    """Measure what a session's link to the store carries, and how much trainings wait for it.

    Ctrl-C ends it with what was measured so far. Exits with 0 where it ran to its end (the report
    lists what could not be measured), 1 otherwise.
    """
    parts = _parts(part or [])
    # Ended from outside too, it leaves no session behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if site is None:
        if plan or lab or iperf3:
            raise typer.BadParameter("--plan, --lab and --iperf3 go with --site")
        study = _here(parts, quick=quick, compute=compute)
    else:
        if lab == bool(plan):
            raise typer.BadParameter("say either --lab or --plan FILE")
        deployments = [load_plan(one, site) for one in plan or []] or [lab_deployment(site)]
        study = _visit(deployments, parts, iperf3, quick=quick, compute=compute)
        stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
        out = out or Path(f"bench-link-{site}-{stamp}")
    _show(study, out)
    if study.problems or not study.runs or not all(run.report.complete for run in study.runs):
        raise typer.Exit(1)


def _parts(given: list[str]) -> list[Part]:
    from kakehashi.link.bench.results import PARTS

    unknown = sorted(set(given).difference(PARTS))
    if unknown:
        raise typer.BadParameter(f"there is no part {unknown[0]!r}; known: {', '.join(PARTS)}")
    return [one for one in PARTS if one in given]


def _here(parts: list[Part], *, quick: bool, compute: float) -> Study:
    from kakehashi.link.bench.report import Run, Study
    from kakehashi.link.bench.results import PARTS
    from kakehashi.link.bench.run import measure
    from kakehashi.link.bench.ways import Settings
    from kakehashi.link.session import Session

    settings = Settings.chosen(quick=quick, compute_s=compute)
    report = measure(Session.current(), settings, parts or PARTS)
    return Study(runs=(Run(label="this session", report=report),))


def _visit(
    deployments: list[Deployment],
    parts: list[Part],
    host: str | None,
    *,
    quick: bool,
    compute: float,
) -> Study:
    from kakehashi.link.bench.visit import Visit, iperf3

    people = [one.visitor.name for one in deployments]
    if len(set(people)) < len(people):
        raise ConfigError("each plan needs another person: one person has one session")
    line = None if host is None else iperf3(host)
    arguments = ["--compute", str(compute), *(["--quick"] if quick else [])]
    return Visit(deployments, arguments, parts).study(line)


def _show(study: Study, out: Path | None) -> None:
    from kakehashi.link.bench import report

    Console().print(Markdown(report.markdown(study)))
    if out is not None:
        for path in report.write(study, out):
            typer.echo(str(path))
