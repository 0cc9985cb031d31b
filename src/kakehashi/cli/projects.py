"""``kakehashi store project``: from request to end."""

from __future__ import annotations

import contextlib
import datetime as dt  # noqa: TC003 - typer reads it at run time
import json
import os
import signal
import time
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
TAKEN_OVER_S = 30.0
"""Seconds that a running store has to take over what was changed."""
_LOOK_S = 0.1
_ENDED = "the project has ended"
Id = Annotated[str, typer.Argument(metavar="PROJECT", help="The project's id.")]


def _projects(config: Config) -> Projects:
    from kakehashi.store.projects import Projects

    return Projects(config, StoreTrail(config))


def tell_the_store(config: Config, patience_s: float | None = None) -> str:
    """Let a running store read its configuration anew, and say whether it has.

    Parameters
    ----------
    config : Config
    patience_s : float, optional
        Seconds to wait for it, `TAKEN_OVER_S` by default.

    Returns
    -------
    str
        What to tell the operator.

    Raises
    ------
    StoreError
        It runs, and goes on with the configuration of before.
    """
    run = _run_folder(config)
    return _wait_for(run, _call(run), patience_s)


def _run_folder(config: Config) -> Path:
    from kakehashi.store.authority.layout import Layout

    return Layout(config.need_store().root).run


def _call(run: Path) -> int | None:
    """Tell a running store to read its configuration; return its authority's pid, if it runs."""
    from kakehashi.store.authority.services import Services

    # A store that was killed leaves its pid behind, and by now that may be any process's.
    if not _is_served(run):
        return None
    try:
        before = Services.read(run).authority
        os.kill(int((run / "serve.pid").read_text(encoding="ascii")), signal.SIGHUP)
    except (OSError, ValueError, StoreError):
        return None
    return before


def _is_served(run: Path) -> bool:
    """Say whether a supervisor holds the lock that it has for as long as it runs."""
    from kakehashi.store.layout import locked

    lock = run / "serve.lock"
    if not lock.exists():
        return False
    try:
        with locked(lock, wait=False):
            return False
    except StoreError:
        return True


def _wait_for(run: Path, before: int | None, patience_s: float | None = None) -> str:
    """Wait until the store that was called has another authority; see :func:`tell_the_store`."""
    from kakehashi.store.authority.services import Services

    if before is None:
        return "the store does not run; it reads this when it starts"
    patience_s = TAKEN_OVER_S if patience_s is None else patience_s
    typer.echo(f"waiting up to {patience_s:g} s for the running store to take this over")
    until = time.monotonic() + patience_s
    while True:
        # Only with a configuration that it took does it start its authority anew.
        with contextlib.suppress(StoreError):
            if Services.read(run).authority not in {0, before}:
                return "the running store has taken it over"
        if time.monotonic() > until:
            raise StoreError(
                "this is written, but the running store has not taken it over within "
                f"{patience_s:g} s and goes on with what it had before; what `kakehashi store "
                "serve` prints says why. If [store] was changed, it has to be restarted"
            )
        time.sleep(_LOOK_S)  # a restarted service is seen in a file only, which tells nobody


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
    typer.echo(f"{project}: approved until {expires:%Y-%m-%d}, {len(built.cohort.series)} series")
    typer.echo(tell_the_store(opened))


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
    """End an approved project: running sessions end, and its view is taken away.

    It can be interrupted and repeated.
    """
    from kakehashi.store.view import remove_view

    before = configuration.load(config)
    _projects(before).end(project, by, reason)
    run = _run_folder(before)
    called = _call(run)
    # Not after the wait, which may be long: what was given away before ends now.
    ended = end_sessions(before, project, by, _ENDED)
    remove_view(before, project)
    typer.echo(
        f"{project}: ended, with {len(ended)} session(s); its work folder stays until somebody "
        "removes it"
    )
    try:
        typer.echo(_wait_for(run, called))
    finally:
        if called is not None:
            # Whoever came while the store still went by what it had before.
            end_sessions(before, project, by, _ENDED)


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
