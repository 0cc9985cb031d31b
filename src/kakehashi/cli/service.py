"""``kakehashi store init``, ``serve``, ``hub-add`` and ``rotate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kakehashi.config import load

ConfigPath = Annotated[
    Path,
    typer.Option("--config", envvar="KAKEHASHI_CONFIG", help="The configuration file."),
]
DEFAULT_CONFIG = Path("/etc/kakehashi.toml")


def init(config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Make the store's accounts, folders, keys and sshd configuration; may be repeated."""
    from kakehashi.store.authority import sshd

    loaded = load(config)
    for line in sshd.initialise(loaded):
        typer.echo(line)
    if loaded.need_store().catalogue_port is not None:
        from kakehashi.store.indexing import opened

        opened(loaded.need_store())


def serve(config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Run sshd, the authority and the guard until SIGTERM."""
    from kakehashi.store.authority import supervisor

    supervisor.serve(config)


def hub_add(
    name: Annotated[str, typer.Argument(help="What the store calls this hub.")],
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Make a hub's credential and print it, this once; an earlier one of that name is void."""
    from kakehashi.store.authority import hubs
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.layout import Layout, names

    store = load(config).need_store()
    with acting_as(names(store).authority):
        token = hubs.add(Layout(store.root).hubs, name)
    typer.echo(token.reveal())


def rotate(
    what: Annotated[
        Literal["user-ca", "host-key", "host-ca"], typer.Argument(help="Which key to replace.")
    ],
    *,
    now: Annotated[
        bool, typer.Option("--now", help="The old key was stolen: trust it no more, from now on.")
    ] = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Replace a key of the store; sessions go on, and the old key is dropped when unused.

    With --now a session's next connection waits for its next renewal. A host key is then
    replaced together with the host CA, which vouches for the old one.
    """
    from kakehashi.store.authority import rotation

    typer.echo(rotation.rotate(load(config), what, at_once=now))
