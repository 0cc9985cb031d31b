"""``kakehashi sessions``, ``revoke``, ``allow`` and ``blocks``: rights, in an operator's hands."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kakehashi.config import load
from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kakehashi.config import Config
    from kakehashi.store.authority.authority import Authority
    from kakehashi.store.authority.book import BlockKind

ConfigPath = Annotated[
    Path,
    typer.Option("--config", envvar="KAKEHASHI_CONFIG", help="The configuration file."),
]
DEFAULT_CONFIG = Path("/etc/kakehashi.toml")
PATIENCE_S = 10.0
POLL_S = 0.05

SessionName = Annotated[str | None, typer.Option(help="A session, 32 hexadecimal digits.")]
PersonName = Annotated[str | None, typer.Option(help="A person, as the provider names them.")]
SiteName = Annotated[str | None, typer.Option(help="A site, as the configuration names it.")]
Everybody = Annotated[bool, typer.Option("--all", help="Everybody, everywhere.")]
By = Annotated[str, typer.Option(help="Who says so; it stands in the audit trail.")]


@contextmanager
def _authority(config: Path) -> Iterator[Authority]:
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.authority import Authority
    from kakehashi.store.authority.layout import names

    loaded = load(config)
    with acting_as(names(loaded.need_store()).authority):
        authority = Authority(loaded)
        try:
            yield authority
        finally:
            authority.close()


def end_sessions(loaded: Config, project: str, by: str, reason: str) -> list[str]:
    """End all sessions of a project, and return them."""
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.authority import Authority
    from kakehashi.store.authority.layout import names

    with acting_as(names(loaded.need_store()).authority):
        authority = Authority(loaded)
        try:
            live = [one["session"] for one in authority.live() if one["project"] == project]
            for session in live:
                authority.revoke(None, session, by, reason)
        finally:
            authority.close()
    return live


def _whom(person: str | None, site: str | None) -> tuple[BlockKind, str]:
    if person is not None:
        return "person", person
    if site is not None:
        return "site", site
    return "all", ""


def _need_one(*given: object) -> None:
    if sum(bool(one) for one in given) != 1:
        raise typer.BadParameter("say exactly one of --session, --person, --site, --all")


def revoke(
    *,
    reason: Annotated[str, typer.Option(help="Why; people see it, and the audit trail has it.")],
    by: By,
    session: SessionName = None,
    person: PersonName = None,
    site: SiteName = None,
    everybody: Everybody = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """End sessions at once; a person, a site or all are refused new ones until `allow`.

    The store closes the connections itself, also where its authority does not answer.
    """
    _need_one(session, person, site, everybody)
    began = time.monotonic()
    with _authority(config) as authority:
        connections = {one["session"]: one["connections"] for one in authority.live()}
        if session is not None:
            authority.revoke(None, session, by, reason)
            ended = [session]
        else:
            kind, name = _whom(person, site)
            ended = authority.cut(kind, name, by, reason)
        left = {one: authority.connections_left(one) for one in ended}
        # The guard, another process, notes each closing in the book: there is no event of it.
        while any(left.values()) and time.monotonic() - began < PATIENCE_S:
            time.sleep(POLL_S)
            left = {one: authority.connections_left(one) for one in ended}
    for one in ended:
        typer.echo(f"{one} is revoked")
    standing = sum(left.values())
    closed = sum(connections.get(one, 0) for one in ended) - standing
    typer.echo(
        f"{len(ended)} session(s) and {closed} connection(s) ended in "
        f"{time.monotonic() - began:.1f} s; {standing} of their connections still stand"
    )
    if standing:
        raise StoreError(
            "connections still stand; is `kakehashi store serve` running? Stopping it closes all"
        )


def allow(
    *,
    by: By,
    person: PersonName = None,
    site: SiteName = None,
    everybody: Everybody = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Lift what `revoke` has blocked."""
    _need_one(person, site, everybody)
    kind, name = _whom(person, site)
    with _authority(config) as authority:
        if not authority.allow(kind, name, by):
            raise StoreError(f"{' '.join((kind, name)).strip()} is not blocked")
    typer.echo(f"{' '.join((kind, name)).strip()} is allowed again")


def blocks(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """List what is blocked, by whom and why."""
    from kakehashi.audit.canonical import utc

    with _authority(config) as authority:
        found = authority.blocks()
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], ensure_ascii=False, indent=2))
        return
    for one in found:
        typer.echo(f"{one.kind} {one.name}  since {utc(one.time)} by {one.by}: {one.reason}")
    if not found:
        typer.echo("nothing is blocked")


def sessions(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """List the sessions that have not ended, with their open connections."""
    with _authority(config) as authority:
        found = authority.live()
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    for one in found:
        typer.echo(
            f"{one['session']}  {one['person']}  {one['project']}  {one['site']} "
            f"{one['host'] or '-'}  {one['connections']} connection(s), ends {one['ends_at']}"
        )
    if not found:
        typer.echo("no session runs")
