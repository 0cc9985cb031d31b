"""``kakehashi node``: what concerns a compute node."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path  # noqa: TC003 - typer reads annotations at run time
from typing import Annotated

import typer
from rich.console import Console

from kakehashi.config import Node as NodeSection
from kakehashi.config import load
from kakehashi.errors import ConfigError
from kakehashi.session import check as checks
from kakehashi.session.plan import Node

app = typer.Typer(no_args_is_help=True)


@app.callback()
def node() -> None:
    """Look after a compute node."""


@app.command("check")
def check(
    config: Annotated[
        Path | None, typer.Option(help="kakehashi.toml with the site's rules for its nodes.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="The site in it.")] = None,
    software: Annotated[
        Path | None, typer.Option(help="Where Kakehashi is installed, if not as configured.")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that this node may run sessions; run it as a person's account, not as root.

    Builds a payload's world, without a store, and probes it from inside.
    """
    results = checks.node_checks(_rules(config, site, software))
    well = all(one.ok for one in results)
    if as_json:
        value = {"ok": well, "checks": [one.to_json() for one in results]}
        typer.echo(json.dumps(value, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        for one in results:
            mark = "[green]ok[/]     " if one.ok else "[red]missing[/]"
            console.print(f"{mark} {one.check}: ", end="")
            console.print(one.message, markup=False)
    if not well:
        raise typer.Exit(1)


def _rules(config: Path | None, site: str | None, software: Path | None) -> Node:
    """Return the site's rules, or the defaults, as the wrapper gets them."""
    if (config is None) != (site is None):
        raise ConfigError("--config and --site go together: the file, and the site in it")
    section = NodeSection()
    if config is not None and site is not None:
        sites = load(config).sites
        if site not in sites:
            raise ConfigError(f"{config}: there is no site {site!r}, only {sorted(sites)}")
        section = sites[site].node
    value = section.model_dump(mode="json")
    if software is not None:
        value["software"] = str(software.absolute())
    return Node.parse({field.name: value[field.name] for field in fields(Node)})
