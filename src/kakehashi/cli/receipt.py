"""``kakehashi receipt``: what was seen of a session's end, and by whom."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kakehashi.cli.service import DEFAULT_CONFIG, ConfigPath
from kakehashi.config import load

app = typer.Typer(help="The receipts of ended sessions.", no_args_is_help=True)

WITNESSES = {
    "store": "the store itself",
    "site": "the site's root",
    "wrapper": "claimed by the session's wrapper",
    "scheduler": "the scheduler",
    "none": "nobody",
}


@app.command()
def show(
    session: Annotated[str, typer.Argument(help="The session, 32 hexadecimal digits.")],
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt itself.")] = False,  # noqa: FBT002 - typer's way
) -> None:
    """Check a receipt's signature and show it."""
    from kakehashi.store.authority import receipt
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.ca import load_public
    from kakehashi.store.authority.layout import Layout, names

    store = load(config).need_store()
    layout = Layout(store.root)
    with acting_as(names(store).authority):
        document = receipt.read(layout.receipts, session)
        receipt.verify(document, load_public(layout.keys / "receipt.pub"))
    if as_json:
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        _print(document)


@app.command("list")
def list_receipts(
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,  # noqa: FBT002 - typer's way
) -> None:
    """List the receipts, in order of the sessions' ends."""
    from kakehashi.store.authority import receipt
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.layout import Layout, names

    store = load(config).need_store()
    folder = Layout(store.root).receipts
    with acting_as(names(store).authority):
        documents = [receipt.read(folder, session) for session in receipt.sessions(folder)]
    documents.sort(key=lambda document: str(document.get("ended_at")))
    fields = ("session", "person", "project", "site", "ended_at", "reason", "state")
    if as_json:
        rows = [{field: document.get(field) for field in fields} for document in documents]
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = Table("session", "person", "project", "site", "ended", "reason", "state")
    for document in documents:
        table.add_row(*(escape(str(document.get(field) or "")) for field in fields))
    Console().print(table)


def _print(document: dict[str, Any]) -> None:
    console = Console()
    head = Table(show_header=False, title="Receipt, signed by the store", title_justify="left")
    for name, field in (
        ("Session", "session"),
        ("Person", "person"),
        ("Project", "project"),
        ("Site", "site"),
        ("Node", "host"),
        ("Job", "job"),
        ("Walls", "walls"),
        ("Granted", "granted_at"),
        ("Ended", "ended_at"),
        ("Because", "reason"),
        ("State", "state"),
    ):
        head.add_row(name, escape(str(document.get(field) or "-")))
    console.print(head)
    items = Table("what", "result", "seen by", "detail")
    for item in document["items"]:
        items.add_row(
            escape(item["item"]),
            escape(item["result"]),
            escape(WITNESSES.get(item["witness"], item["witness"])),
            escape(item["detail"]),
        )
    console.print(items)
    if document["state"] == "pending":
        console.print(
            "Pending: not every connection was seen closed, or the site's root has yet to report."
        )
