"""``kakehashi store receive``, ``quarantine``, ``expect`` and ``arrivals``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len

from kakehashi.config import load
from kakehashi.errors import ConfigError

if TYPE_CHECKING:
    from kakehashi.store.receive.arrivals import Arrival
    from kakehashi.store.receive.inbox import Inbox
    from kakehashi.store.receive.quarantine import Held

ConfigOption = Annotated[
    Path, typer.Option("--config", envvar="KAKEHASHI_CONFIG", help="The deployment's settings.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Identifier = Annotated[str, typer.Argument(metavar="ID", help="As `quarantine list` names it.")]
DEFAULT_CONFIG = Path("/etc/kakehashi.toml")

quarantine = typer.Typer(
    help="Objects that were received and must not go on by themselves.",
    invoke_without_command=True,
)


def receive(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Receive objects from hospitals over DICOM until SIGTERM.

    Prints one line beginning with ``ready`` when senders may call.
    """
    from kakehashi.store.authority.accounts import become
    from kakehashi.store.authority.layout import names
    from kakehashi.store.receive import listener

    store = load(config).need_store()
    settings = store.receive
    if not settings.senders:
        raise ConfigError(
            f"{config}: store.receive.senders is empty, so nobody could send; name each "
            "hospital's AE titles and addresses"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with listener.listen(settings) as server:
        where = f"{settings.bind}, port {settings.port}, as {settings.ae_title}"
        listener.serve(
            store.root,
            settings,
            server,
            lambda: typer.echo(f"ready: listening on {where}"),
            lambda: become(names(store).receiver),
        )


@quarantine.callback()
def _listed(context: typer.Context, config: ConfigOption = DEFAULT_CONFIG) -> None:
    if context.invoked_subcommand is None:
        list_(config=config)


@quarantine.command("list")
def list_(*, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """List what is in quarantine, with the reason."""
    held = _mended(config).held.list()
    if as_json:
        _print_json([one.as_json() for one in held])
        return
    rows: list[list[object]] = [
        [one.id, one.receipt.facility, f"{one.held_at:%Y-%m-%d %H:%M}", one.reason] for one in held
    ]
    _columns(["id", "facility", "since (UTC)", "reason"], rows)


@quarantine.command()
def show(
    identifier: Identifier, *, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False
) -> None:
    """Show one object: from whom it came, what it says it is, and where its file lies."""
    held = _mended(config).held.get(identifier)
    if as_json:
        _print_json(_details(held))
        return
    for name, value in _details(held).items():
        _print(f"{name:16} {value}")


@quarantine.command()
def release(identifier: Identifier, *, config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Put an object into the inbox after all, as if it came now."""
    _mended(config).release(identifier)
    _print(f"{identifier} is in the inbox")


@quarantine.command()
def discard(identifier: Identifier, *, config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Remove an object for good."""
    _mended(config).discard_held(identifier)
    _print(f"{identifier} is gone")


def expect(
    facility: Annotated[str, typer.Argument(metavar="FACILITY", help="As its sender is named.")],
    table: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="CSV with the columns date, study_uid, instances."),
    ],
    *,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Take a hospital's list of the studies that it sent; `arrivals` compares it."""
    from kakehashi.store.receive import arrivals as comparing

    known = {sender.facility for sender in load(config).need_store().receive.senders}
    if facility not in known:
        raise ConfigError(
            f"no sender's facility is {facility!r}; there are {', '.join(sorted(known)) or 'none'}"
        )
    days = comparing.read_list(table)
    count = comparing.expect(_inbox(config).folders.expected, facility, days)
    _print(f"{facility}: {count} studies expected")


def arrivals(
    *,
    config: ConfigOption = DEFAULT_CONFIG,
    days: Annotated[int, typer.Option(min=1, max=366, help="How many days back.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Compare, by hospital and day, what was expected with what was received."""
    from kakehashi.store.receive import arrivals as comparing

    found = comparing.arrivals(_inbox(config), days)
    if as_json:
        _print_json([one.as_json() for one in found])
        return
    header = ["date", "facility", "expected", "received", "MB", "again", "quarantined", "missing"]
    _columns(header, [_arrival(one) for one in found])
    for one in found:
        for study in one.missing:
            _print(
                f"missing  {one.date} {one.facility} {study.study}: "
                f"{study.received} of {study.expected}"
            )


def _inbox(path: Path) -> Inbox:
    """Open the inbox as the account that owns it, which this process is from then on."""
    from kakehashi.store.authority.accounts import become
    from kakehashi.store.authority.layout import names
    from kakehashi.store.receive.inbox import Inbox

    store = load(path).need_store()
    become(names(store).receiver)
    return Inbox(store.root)


def _mended(path: Path) -> Inbox:
    """Open the inbox, and finish what an earlier command that was cut off left half done."""
    inbox = _inbox(path)
    if inbox.held.torn():
        inbox.mend()
    return inbox


def _details(held: Held) -> dict[str, Any]:
    return held.as_json() | {"path": str(held.path)}


def _arrival(one: Arrival) -> list[object]:
    return [
        one.date,
        one.facility,
        one.expected or "-",
        one.received,
        f"{one.bytes / 1e6:.1f}",
        one.again,
        one.quarantined,
        len(one.missing),
    ]


def _print(text: str) -> None:
    # What came over the network must not steer the terminal.
    typer.echo("".join(c if c.isprintable() or c == "\n" else "?" for c in text))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def _columns(header: list[str], rows: list[list[object]]) -> None:
    cells = [header, *([str(value) for value in row] for row in rows)]
    widths = [max(cell_len(row[at]) for row in cells) for at in range(len(header))]
    for row in cells:
        line = (
            text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)
        )
        _print("  ".join(line).rstrip())
