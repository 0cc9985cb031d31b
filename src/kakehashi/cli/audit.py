"""``kakehashi audit``: is the trail whole, and what stands in it."""

from __future__ import annotations

import json
from collections import deque
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kakehashi.cli.service import DEFAULT_CONFIG, ConfigPath
from kakehashi.config import load
from kakehashi.errors import AuditError

app = typer.Typer(help="The store's audit trail.", no_args_is_help=True)


@app.command("verify")
def verify_trail(
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,  # noqa: FBT002 - typer's way
) -> None:
    """Check every line, the anchors and the heads in the receipts; exit status 1 on a fault."""
    from kakehashi import audit
    from kakehashi.store.authority import receipt
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.ca import load_public
    from kakehashi.store.authority.layout import Layout, names

    store = load(config).need_store()
    layout = Layout(store.root)
    problems: list[audit.Problem] = []
    heads: list[audit.Head] = []
    with acting_as(names(store).authority):
        key = load_public(layout.keys / "receipt.pub")
        for path in store.audit_anchors:
            try:
                found = audit.read_anchors(path, key)
            except AuditError as error:
                problems.append(audit.Problem(None, str(error)))
            else:
                heads += found
                if not found:
                    problems.append(audit.Problem(None, f"{path}: the anchor is empty"))
        for session in receipt.sessions(layout.receipts):
            try:
                heads.append(receipt.verify(receipt.read(layout.receipts, session), key))
            except AuditError as error:
                problems.append(audit.Problem(None, f"receipt of {session}: {error}"))
        verdict = audit.verify(layout.audit, heads)
    problems = [*verdict.problems, *problems]
    if as_json:
        document = {
            "ok": not problems,
            "lines": verdict.lines,
            "anchored": verdict.anchored,
            "problems": [{"line": p.line, "problem": p.message} for p in problems],
        }
        typer.echo(json.dumps(document, ensure_ascii=False))
    else:
        for problem in problems:
            typer.echo(problem.message)
        if not problems:
            typer.echo(
                f"{verdict.lines} lines hold together; anchored up to record {verdict.anchored}"
            )
    if problems:
        raise typer.Exit(1)


@app.command()
def show(
    session: Annotated[str | None, typer.Option(help="Only this session's records.")] = None,
    tail: Annotated[int | None, typer.Option(min=1, help="Only the last N records.")] = None,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Show the records, oldest first."""
    from kakehashi.audit import Audit, Record
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.layout import Layout, names

    store = load(config).need_store()
    chosen: deque[Record] = deque(maxlen=tail)
    with acting_as(names(store).authority):
        for record in Audit(Layout(store.root).audit).records():
            if session is None or record.session == session:
                chosen.append(record)
    table = Table("seq", "time", "what", "session", "person", "detail")
    for record in chosen:
        cells = (
            str(record.seq),
            record.time,
            record.kind,
            (record.session or "")[:8],
            record.person or "",
            json.dumps(record.detail, ensure_ascii=False),
        )
        table.add_row(*(_plain(cell) for cell in cells))
    Console().print(table)


def _plain(text: str) -> str:
    # What a hub wrote must not be read as rich's markup.
    from rich.markup import escape

    return escape(text)
