"""The command line, ``kakehashi``."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from kakehashi import __version__
from kakehashi.cli import (
    audit,
    bench,
    catalogue,
    intake,
    node,
    projects,
    receipt,
    receive,
    rights,
    service,
    store,
    synthetic,
    upkeep,
    verify,
    withdraw,
)
from kakehashi.errors import KakehashiError

app = typer.Typer(
    name="kakehashi",
    help="A medical image platform joined to HPC, for one session at a time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
store.app.command("init")(service.init)
store.app.command("serve")(service.serve)
store.app.command("hub-add")(service.hub_add)
store.app.command("rotate")(service.rotate)
store.app.command("receive")(receive.receive)
store.app.add_typer(receive.quarantine, name="quarantine")
store.app.command("expect")(receive.expect)
store.app.command("arrivals")(receive.arrivals)
store.app.command("intake")(intake.intake)
store.app.command("report")(intake.report)
store.app.command("withdraw")(withdraw.withdraw)
store.app.add_typer(projects.app, name="project")
for command in (upkeep.fsck, upkeep.backup, upkeep.restore, upkeep.quota, upkeep.snapshot):
    store.app.command()(command)
store.app.command("openapi")(catalogue.openapi)
store.app.command("synthetic")(synthetic.synthetic)
app.command("revoke")(rights.revoke)
app.command("sessions")(rights.sessions)
app.command("allow")(rights.allow)
app.command("blocks")(rights.blocks)
app.add_typer(store.app, name="store")
app.add_typer(audit.app, name="audit")
app.add_typer(receipt.app, name="receipt")
app.add_typer(node.app, name="node")
app.add_typer(bench.app, name="bench")
app.command("verify-site")(verify.verify_site)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line; a known error is one clear message and exit status 1."""
    try:
        app()
    except KakehashiError as error:
        Console(stderr=True).print(f"kakehashi: {error}", markup=False, highlight=False)
        sys.exit(1)
