"""``kakehashi store withdraw``: a person takes back the consent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kakehashi import config as configuration
from kakehashi.cli.rights import end_sessions
from kakehashi.cli.trail import StoreTrail
from kakehashi.errors import StoreError

if TYPE_CHECKING:
    from kakehashi.config import Config, StoreHost
    from kakehashi.store.catalogue import Catalogue
    from kakehashi.store.withdraw import Withdrawal

ConfigOption = Annotated[
    Path, typer.Option("--config", envvar="KAKEHASHI_CONFIG", help="The deployment's settings.")
]
DEFAULT_CONFIG = Path("/etc/kakehashi.toml")
_WHY = "a person withdrew from the project's data"


def withdraw(
    patient: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATIENT]",
            help="The id that the hospital has for the person; - reads it from standard input, "
            "where no other account of this machine sees it.",
        ),
    ] = None,
    *,
    by: Annotated[str, typer.Option(help="Who does it; it stands in the audit trail.")],
    reason: Annotated[str, typer.Option(help="Why.")],
    facility: Annotated[
        str | None, typer.Option(help="The hospital, by the store's name for it.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The store's own id of the person, instead of both.")
    ] = None,
    backup: Annotated[
        list[Path] | None,
        typer.Option(help="A backup of the record that is cleared as well; may be repeated."),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove a person: catalogue, views, running sessions, reports and backups.

    Frozen cohorts keep their hash, with a tombstone in each series' place. What was trained
    while a view held the person is listed, by session. The command can be repeated.
    """
    from kakehashi.store.backup import scrub
    from kakehashi.store.catalogue import Catalogue

    if (key is None) == (patient is None or facility is None):
        raise typer.BadParameter("give PATIENT and --facility, or --key")
    if patient == "-":
        patient = sys.stdin.readline().strip()
    settings = configuration.load(config)
    store = settings.need_store()
    catalogue = Catalogue.open(store)
    try:
        if key is None:
            _check_facility(store, catalogue, str(facility))
            key = _key(store, str(facility), str(patient))
        again = key in catalogue.withdrawn()
        done = _withdraw(settings, catalogue, key, by, reason)
        if patient is not None and facility is not None:
            done.quarantined = _clear_quarantine(store, facility, patient)
        # Before what may fail still: a repetition could not tell who saw the person.
        if as_json:
            typer.echo(json.dumps(done.as_json(), ensure_ascii=False, indent=2))
        else:
            _print(done)
        for target in backup or ():
            scrub(target, {key})
    finally:
        catalogue.close()
    if done.problems:
        raise StoreError("; ".join(done.problems))
    if not (done.series or done.kept or done.reports or done.staged or done.quarantined or again):
        raise StoreError(
            f"the store had nothing of {key}; is it the right hospital and id? It is noted as "
            "withdrawn all the same"
        )


def _key(store: StoreHost, facility: str, patient: str) -> str:
    from kakehashi.store.deidentify import Deidentifier, load_key
    from kakehashi.store.layout import Layout

    key = load_key(Layout(store.root).deidentification_key)
    return Deidentifier(key).patient_id(facility, patient)


def _check_facility(store: StoreHost, catalogue: Catalogue, facility: str) -> None:
    known = {sender.facility for sender in store.receive.senders} | catalogue.facilities()
    if facility not in known:
        raise StoreError(
            f"no hospital is called {facility!r}; there are {', '.join(sorted(known)) or 'none'}"
        )


def _withdraw(
    settings: Config, catalogue: Catalogue, patient_id: str, by: str, reason: str
) -> Withdrawal:
    from kakehashi.store.cohorts import Cohorts
    from kakehashi.store.indexing import opened
    from kakehashi.store.intake import Staging
    from kakehashi.store.service.reports import Reports
    from kakehashi.store.withdraw import Places, withdraw

    store = settings.need_store()
    index = opened(store)
    places = Places(
        config=settings,
        catalogue=catalogue,
        index=index,
        cohorts=Cohorts.open(store),
        reports=Reports.open(store),
        staging=Staging(store.root),
        trail=StoreTrail(settings),
        end_sessions=lambda project: end_sessions(settings, project, by, _WHY),
        granted=lambda project: _granted(settings, project),
    )
    done = withdraw(places, patient_id, by, reason)
    # Only now are the person's values out of the index's files, too.
    index.compact()
    return done


def _clear_quarantine(store: StoreHost, facility: str, patient: str) -> int:
    """Discard what is in quarantine of a person; their id stands in the objects as it came."""
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.layout import names
    from kakehashi.store.dicom import attribute, read_head, tolerant
    from kakehashi.store.receive import Inbox

    gone = 0
    with acting_as(names(store).receiver), tolerant():
        inbox = Inbox(store.root)
        for held in inbox.held.list():
            head = read_head(held.path) if held.receipt.facility == facility else None
            if head is not None and str(attribute(head, "PatientID")).strip() == patient.strip():
                inbox.discard_held(held.id)
                gone += 1
    return gone


def _granted(settings: Config, project: str) -> list[dict[str, Any]]:
    """Return the grants of a project, as the audit trail has them."""
    from kakehashi.audit import Audit
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.layout import Layout, names

    store = settings.need_store()
    mine: set[str | None] = set()
    grants = []
    with acting_as(names(store).authority):
        for record in Audit(Layout(store.root).audit).records():
            if record.kind == "session.created" and record.detail.get("project") == project:
                mine.add(record.session)
            elif record.kind == "session.granted" and record.session in mine:
                about = {"session": record.session, "person": record.person, "time": record.time}
                grants.append(about | {"until": None})
            elif record.kind == "session.ended" and record.session in mine:
                for grant in grants:
                    if grant["session"] == record.session:
                        grant["until"] = record.time
    return grants


def _print(done: Withdrawal) -> None:
    typer.echo(
        f"{done.patient_id}: {done.series} series, {done.kept} objects, {done.reports} reports and "
        f"{done.staged} incomplete series removed, {done.quarantined} objects in quarantine; "
        f"{len(done.views)} view(s) built anew, {len(done.sessions)} session(s) ended"
    )
    for cohort in done.cohorts:
        name = cohort["name"] or "the view"
        typer.echo(f"frozen cohort  {cohort['project']}: {name}, version {cohort['version']}")
    for grant in done.trained:
        typer.echo(
            f"was granted    {grant['project']}: {grant['person']}, session {grant['session']}, "
            f"{grant['time']}"
        )
