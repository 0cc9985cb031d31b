"""``kakehashi store project``: from request to end."""

from __future__ import annotations

import datetime as dt  # noqa: TC003 - typer reads it at run time
import json
import os
import signal
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kakehashi import config as configuration
from kakehashi.cli.rights import end_sessions
from kakehashi.cli.trail import StoreTrail
from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from kakehashi.config import Config
    from kakehashi.store.projects import Projects, Standing

app = typer.Typer(help="Projects: request, approval, end.", no_args_is_help=True)

ConfigOption = Annotated[
    Path, typer.Option("--config", envvar="KAKEHASHI_CONFIG", help="The deployment's settings.")
]
DEFAULT_CONFIG = Path("/etc/kakehashi.toml")
By = Annotated[str, typer.Option(help="Who says so; it stands in the audit trail.")]
Id = Annotated[str, typer.Argument(metavar="PROJECT", help="The project's id.")]


def _projects(config: Config) -> Projects:
    from kakehashi.store.projects import Projects

    return Projects(config, StoreTrail(config))


def _tell_the_store(config: Config) -> None:
    """Let a running store read its configuration anew; one that does not run will anyway."""
    from kakehashi.store.authority.layout import Layout

    try:
        pid = int((Layout(config.need_store().root).run / "serve.pid").read_text(encoding="ascii"))
        os.kill(pid, signal.SIGHUP)
    except (OSError, ValueError):
        typer.echo("the store does not run; it reads this when it starts")


@app.command()
def request(
    definition: Annotated[
        Path, typer.Argument(metavar="FILE", help="The project, as TOML: id, title, purpose, ...")
    ],
    by: By,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Write down a request; it gives nothing until somebody else approves it."""
    try:
        wanted = tomllib.loads(definition.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{definition}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{definition}: is not valid TOML: {error}") from error
    standing = _projects(configuration.load(config)).request(wanted, by)
    typer.echo(f"{standing.project.id}: requested; it waits for somebody else's approval")


@app.command()
def approve(
    project: Id,
    by: By,
    approval: Annotated[str, typer.Option(help="Number of the ethics committee's approval.")],
    expires: Annotated[
        dt.datetime, typer.Option(formats=["%Y-%m-%d"], help="The last day (UTC) of its grants.")
    ],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Open a requested project: its accounts and its view are made, and its people may begin."""
    from kakehashi.store.authority import sshd
    from kakehashi.store.view import build_view

    _projects(configuration.load(config)).approve(project, by, approval, expires.date())
    opened = configuration.load(config)
    sshd.initialise(opened)
    built = build_view(opened, project)
    _tell_the_store(opened)
    typer.echo(f"{project}: approved until {expires:%Y-%m-%d}, {len(built.cohort.series)} series")


@app.command()
def decline(
    project: Id,
    by: By,
    reason: Annotated[str, typer.Option(help="Why.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Refuse a request; it may be made again."""
    _projects(configuration.load(config)).decline(project, by, reason)
    typer.echo(f"{project}: declined")


@app.command()
def end(
    project: Id,
    by: By,
    reason: Annotated[str, typer.Option(help="Why.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """End an approved project: running sessions end, and its view is taken away."""
    from kakehashi.store.view import remove_view

    before = configuration.load(config)
    _projects(before).end(project, by, reason)
    _tell_the_store(before)
    ended = end_sessions(before, project, by, "the project has ended")
    remove_view(before, project)
    typer.echo(
        f"{project}: ended, with {len(ended)} session(s); its work folder stays until somebody "
        "removes it"
    )


@app.command("list")
def list_(
    *,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List all projects: those of the configuration, and requests with their history."""
    standings = _projects(configuration.load(config)).list()
    if as_json:
        text = [standing.as_json() for standing in standings]
        typer.echo(json.dumps(text, ensure_ascii=False, indent=2))
        return
    for standing in standings:
        typer.echo(_line(standing))


def _line(standing: Standing) -> str:
    project = standing.project
    steps = ", ".join(f"{one['step']} by {one['by']} {one['at'][:10]}" for one in standing.history)
    return (
        f"{project.id:20} {standing.state:10} {project.approval} until "
        f"{project.expires.isoformat()}  {steps}"
    ).rstrip()
