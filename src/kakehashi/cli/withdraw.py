"""``kakehashi store withdraw``: a person takes back the consent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kakehashi import config as configuration
from kakehashi.cli.trail import StoreTrail

if TYPE_CHECKING:
    from kakehashi.config import Config, StoreHost
    from kakehashi.store.withdraw import Withdrawal

ConfigOption = Annotated[
    Path, typer.Option("--config", envvar="KAKEHASHI_CONFIG", help="The deployment's settings.")
]
DEFAULT_CONFIG = Path("/etc/kakehashi.toml")


def withdraw(
    patient: Annotated[
        str, typer.Argument(metavar="PATIENT", help="The id that the hospital has for the person.")
    ],
    *,
    facility: Annotated[str, typer.Option(help="The hospital, by the store's name for it.")],
    by: Annotated[str, typer.Option(help="Who does it; it stands in the audit trail.")],
    reason: Annotated[str, typer.Option(help="Why.")],
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
    from kakehashi.store.deidentify import Deidentifier, load_key
    from kakehashi.store.layout import Layout

    settings = configuration.load(config)
    store = settings.need_store()
    key = Deidentifier(load_key(Layout(store.root).deidentification_key)).patient_id(
        facility, patient
    )
    catalogue = Catalogue.open(store)
    try:
        done = _withdraw(settings, catalogue, key, by, reason)
        done.quarantined = _clear_quarantine(store, facility, patient)
        for target in backup or ():
            scrub(target, {key})
    finally:
        catalogue.close()
    if as_json:
        typer.echo(json.dumps(done.as_json(), ensure_ascii=False, indent=2))
    else:
        _print(done, len(backup or ()))


def _withdraw(
    settings: Config, catalogue: Any, patient_id: str, by: str, reason: str
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
        end_sessions=lambda project: _end_sessions(settings, project, by),
        granted=lambda project: _granted(settings, project),
    )
    done = withdraw(places, patient_id, by, reason)
    if done.series:
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


def _end_sessions(settings: Config, project: str, by: str) -> list[str]:
    from kakehashi.store.authority.accounts import acting_as
    from kakehashi.store.authority.authority import Authority
    from kakehashi.store.authority.layout import names

    with acting_as(names(settings.need_store()).authority):
        authority = Authority(settings)
        try:
            live = [one["session"] for one in authority.live() if one["project"] == project]
            for session in live:
                authority.revoke(None, session, by, "a person withdrew from the project's data")
        finally:
            authority.close()
    return live


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
                grants.append(about)
    return grants


def _print(done: Withdrawal, backups: int) -> None:
    typer.echo(
        f"{done.patient_id}: {done.series} series, {done.kept} objects, {done.reports} reports and "
        f"{done.staged} incomplete series removed, {done.quarantined} objects in quarantine; "
        f"{len(done.views)} view(s) built anew, "
        f"{len(done.sessions)} session(s) ended, {backups} backup(s) cleared"
    )
    for cohort in done.cohorts:
        name = cohort["name"] or "the view"
        typer.echo(f"frozen cohort  {cohort['project']}: {name}, version {cohort['version']}")
    for grant in done.trained:
        typer.echo(
            f"was granted    {grant['project']}: {grant['person']}, session {grant['session']}, "
            f"{grant['time']}"
        )
