"""``kakehashi store intake`` and ``report``: from what hospitals sent to what can be searched."""

from __future__ import annotations

import logging
import resource
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kakehashi import config as configuration
from kakehashi.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kakehashi.config import Config
    from kakehashi.secret import Secret
    from kakehashi.store.intake import Intake

ConfigOption = Annotated[
    Path, typer.Option("--config", envvar="KAKEHASHI_CONFIG", help="The deployment's settings.")
]
DEFAULT_CONFIG = Path("/etc/kakehashi.toml")


def intake(
    *,
    once: Annotated[
        bool, typer.Option("--once", help="Take what is there, pack all of it, and end.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """De-identify what was received, pack complete series, and keep the index, until SIGTERM."""
    # What lies in memory is identifiable.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    with _opened(configuration.load(config)) as worker:
        if once:
            worker.once()
        else:
            stop = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            typer.echo("ready: taking in what was received")
            worker.run(stop)
        done = worker.progress
    typer.echo(
        f"{done.taken} objects taken, {done.again} were there, {len(done.quarantined)} in "
        f"quarantine, {done.withdrawn} of people who withdrew; {done.packed} series packed, "
        f"{done.kept} objects kept"
    )


def report(
    facility: Annotated[str, typer.Argument(metavar="FACILITY", help="As its sender is named.")],
    table: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="CSV with the columns study_uid, patient_id, text and, if there, patient_name.",
        ),
    ],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Take a hospital's list of reports: de-identified, linked with their studies, searchable."""
    from kakehashi.store.catalogue import Catalogue
    from kakehashi.store.deidentify import Deidentifier
    from kakehashi.store.intake.reports import read_list, take
    from kakehashi.store.layout import Layout, locked
    from kakehashi.store.service.reports import Reports

    settings = configuration.load(config)
    store = settings.need_store()
    known = {sender.facility for sender in store.receive.senders}
    if facility not in known:
        raise ConfigError(
            f"no sender's facility is {facility!r}; there are {', '.join(sorted(known)) or 'none'}"
        )
    catalogue = Catalogue.open(store)
    reports = Reports.open(store)
    Layout(store.root).packs.mkdir(mode=0o750, exist_ok=True)
    try:
        sent = list(read_list(table))
        with locked(Layout(store.root).packs / ".lock", wait=True):
            # Who withdraws takes this lock too, and is either before us or behind us.
            withdrawn = catalogue.withdrawn()
            new = take(sent, facility, Deidentifier(_key(settings)), reports, withdrawn)
    finally:
        reports.close()
        catalogue.close()
    typer.echo(
        f"{facility}: {new} new reports, {len(sent) - new} not taken: they were there, or the "
        "person withdrew"
    )


def _key(settings: Config) -> Secret:
    from kakehashi.store.deidentify import load_key
    from kakehashi.store.layout import Layout

    path = Layout(settings.need_store().root).deidentification_key
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return load_key(path, create=True)


@contextmanager
def _opened(settings: Config) -> Iterator[Intake]:
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.layout import names
    from kakehashi.store.catalogue import Catalogue
    from kakehashi.store.deidentify import Deidentifier
    from kakehashi.store.indexing import opened
    from kakehashi.store.intake import Intake, Packer, Parser
    from kakehashi.store.receive import Inbox
    from kakehashi.store.service.reports import Reports

    store = settings.need_store()
    with acting_as(names(store).receiver):
        inbox = Inbox(store.root)
    key = _key(settings)
    parser = Parser(key, names(store).intake)
    packer = Packer(store.root, names(store).intake)
    catalogue = Catalogue.open(store)
    reports = Reports.open(store)
    try:
        yield Intake(
            store,
            catalogue,
            inbox=inbox,
            deidentifier=Deidentifier(key),
            parser=parser,
            packer=packer,
            reports=reports,
            index=opened(store),
            as_receiver=lambda: acting_as(names(store).receiver),
        )
    finally:
        parser.close()
        packer.close()
        reports.close()
        catalogue.close()
