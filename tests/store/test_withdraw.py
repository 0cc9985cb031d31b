"""A person who withdraws is gone from everything, stays away, and who saw them is listed."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from types import SimpleNamespace

import pydicom
import pytest

from kakehashi.audit import Audit
from kakehashi.store.catalogue import TOMBSTONE
from kakehashi.store.cohorts import Cohorts
from kakehashi.store.indexing import catch_up, opened
from kakehashi.store.ingest import Origin
from kakehashi.store.intake.staging import Staging
from kakehashi.store.layout import Layout, blocks_path, locked
from kakehashi.store.query import TRUE
from kakehashi.store.service.reports import Reports
from kakehashi.store.view import MANIFEST, build_view
from kakehashi.store.withdraw import Places, withdraw

from .conftest import DATA, StoreUnderTest, files_of

TIME = "2999-01-01T00:00:00Z"
"""Later than any cohort was frozen here."""


@pytest.fixture
def full(store: StoreUnderTest):
    """A store with two people, in a view, in a saved cohort, in reports and in staging."""
    store.add(DATA / "ct_chest", DATA / "sts")
    rows = store.catalogue.list_series()
    (gone,) = {row.patient_id for row in rows if "STS" in row.patient_id}
    host = store.config.need_store()
    (store.root / "service").mkdir()
    index = opened(host)
    catch_up(host, store.catalogue, index)
    cohorts, reports, staging = Cohorts.open(host), Reports.open(host), Staging(store.root)
    for name in ("ct", "everything"):
        build_view(store.config, name, store.catalogue)
    for row in rows:
        reports.add(row.study_uid, "F01", f"所見 of {row.patient_id}", patient_id=row.patient_id)
    for name in ("sts_ct", "ct_chest"):
        path = files_of(name)[0]
        patient = str(pydicom.dcmread(path, stop_before_pixels=True).PatientID)
        staging.put(f"1.2.{len(name)}", "1.2.3", Origin("F01"), patient, path.read_bytes())
    saved = cohorts.save(project="ct", owner="tanaka", name="all", query="True", selections={})
    members = [(row.series_uid, row.blocks) for row in rows]
    cohorts.freeze(saved, members, by="tanaka", withdrawals=cohorts.withdrawals())
    ended: list[str] = []
    yield SimpleNamespace(
        store=store,
        rows=rows,
        gone=gone,
        ended=ended,
        index=index,
        cohorts=cohorts,
        reports=reports,
        staging=staging,
        audit=Audit(store.root / "audit.jsonl"),
        places=Places(
            config=store.config,
            catalogue=store.catalogue,
            index=index,
            cohorts=cohorts,
            reports=reports,
            staging=staging,
            trail=Audit(store.root / "audit.jsonl"),
            end_sessions=lambda project: ended.append(project) or [f"session of {project}"],
            granted=lambda project: [grant(project, TIME, None)],
        ),
    )
    cohorts.close()
    reports.close()


def grant(session: str, time: str, until: str | None) -> dict[str, str | None]:
    return {"session": session, "person": "tanaka", "time": time, "until": until}


def theirs(full) -> list:
    return [row for row in full.rows if row.patient_id == full.gone]


def traces(full) -> list[str]:
    """Everything below the root, but the audit trail, that names a series of the person."""
    found = []
    for path in full.store.root.rglob("*"):
        if path.is_file() and path.name != "audit.jsonl":
            content = path.read_bytes()
            if any(row.series_uid.encode() in content for row in theirs(full)):
                found.append(path.relative_to(full.store.root).as_posix())
            if any(row.series_uid in path.name for row in theirs(full)):
                found.append(path.name)
    return found


def test_a_person_is_gone_from_everything(full):
    assert traces(full)
    done = withdraw(full.places, full.gone, "manager", "asked to")
    assert full.index.count(TRUE, permission=TRUE) == 1
    full.index.compact()
    assert traces(full) == []
    assert {row.patient_id for row in full.store.catalogue.list_series()} != {full.gone}
    assert done.series == len(theirs(full))
    assert done.kept > 0
    assert (done.reports, done.staged) == (1, 1)
    for row in full.rows:
        pack = Layout(full.store.root).absolute(row.path)
        stays = row.patient_id != full.gone
        assert (pack.exists(), blocks_path(pack).exists()) == (stays, stays)
        assert bool(full.reports.of_study(row.study_uid)) == stays
    for project in ("ct", "everything"):
        manifest = json.loads((full.store.root / "views" / project / MANIFEST).read_bytes())
        assert len(manifest["files"]) == 1


def test_who_saw_the_person_is_listed_and_their_sessions_end(full):
    done = withdraw(full.places, full.gone, "manager", "asked to")
    assert done.views == ["ct", "everything"]
    # Before the view is built anew, and once more after it.
    assert full.ended == ["ct", "everything"] * 2
    assert set(done.sessions) == {"session of ct", "session of everything"}
    assert [(one["project"], one["name"], one["version"]) for one in done.cohorts] == [
        ("ct", "all", 1),
        ("ct", "", 1),
        ("everything", "", 1),
    ]
    assert [(one["project"], one["person"], one["version"]) for one in done.trained] == [
        ("ct", "tanaka", 1),
        ("everything", "tanaka", 1),
    ]
    kinds = [record.kind for record in full.audit.records()]
    assert kinds == ["patient.withdrawn", "patient.seen", "patient.removed"]


def test_a_grant_from_before_the_person_was_there_is_not_listed(full):
    early = [grant("s", "1999-01-01T00:00:00Z", "1999-01-01T01:00:00.5Z")]
    places = dataclasses.replace(full.places, granted=lambda project: early)
    assert withdraw(places, full.gone, "manager", "asked to").trained == []


def test_frozen_cohorts_keep_their_hash_and_a_tombstone(full):
    before = full.store.catalogue.cohort("everything")
    withdraw(full.places, full.gone, "manager", "asked to")
    first = next(
        cohort
        for cohort in full.store.catalogue.cohort_history()
        if (cohort.project, cohort.version) == ("everything", 1)
    )
    assert first.sha256 == before.sha256
    assert first.series.count(TOMBSTONE) == len(theirs(full))
    assert full.store.catalogue.cohort("everything").version == 2


def test_what_comes_again_of_the_person_is_not_taken_in(full):
    withdraw(full.places, full.gone, "manager", "asked to")
    report = full.store.add(DATA / "sts", DATA / "ct_chest")
    assert report.packed == []
    assert full.gone not in {kept.patient_id for kept in full.store.catalogue.list_kept()}
    assert len(report.withdrawn) > 100
    assert traces(full) == [] or full.index.compact() is not None


@pytest.mark.parametrize("step", ["build_view", "_remove", "end_sessions", "forget"])
def test_cut_off_anywhere_it_is_finished_by_repeating_it(full, monkeypatch, step):
    def die(*_, **__):
        raise KeyboardInterrupt

    places = full.places
    with monkeypatch.context() as patch:
        if step == "end_sessions":
            places = dataclasses.replace(places, end_sessions=die)
        elif step == "forget":
            patch.setattr(full.store.catalogue, "forget", die)
        else:
            patch.setattr(f"kakehashi.store.withdraw.{step}", die)
        with pytest.raises(KeyboardInterrupt):
            withdraw(places, full.gone, "manager", "asked to")
    assert full.gone in full.store.catalogue.withdrawn()
    done = withdraw(full.places, full.gone, "manager", "again")
    full.index.compact()
    assert traces(full) == []
    assert done.views == ["ct", "everything"]
    assert full.ended[-2:] == done.views
    assert full.store.catalogue.of_patient(full.gone) == ([], [])


def test_nobody_else_is_touched_by_an_id_that_is_not_there(full):
    done = withdraw(full.places, "K-nobody", "manager", "wrong id")
    assert (done.series, done.kept, done.views, full.ended) == (0, 0, [], [])
    assert len(full.store.catalogue.list_series()) == len(full.rows)


def test_a_session_that_went_on_into_the_cohort_is_listed(full):
    long = [grant("s", "1999-01-01T00:00:00Z", None)]
    places = dataclasses.replace(full.places, granted=lambda project: long)
    assert [one["version"] for one in withdraw(places, full.gone, "m", "r").trained] == [1, 1]


def test_damage_in_a_view_keeps_nothing_of_the_person(full):
    (other,) = (row for row in full.rows if row.patient_id != full.gone)
    Layout(full.store.root).absolute(other.path).write_bytes(b"damaged")
    forgotten = full.store.root / "views" / "forgotten" / "series"
    forgotten.mkdir(parents=True)
    row = theirs(full)[0]
    (forgotten / f"{row.series_uid}.ozx").hardlink_to(Layout(full.store.root).absolute(row.path))
    done = withdraw(full.places, full.gone, "manager", "asked to")
    assert len(done.problems) == 2
    assert not [
        path
        for path in (full.store.root / "views").rglob("*.ozx")
        if path.stem in {row.series_uid for row in theirs(full)}
    ]


def test_nobody_finds_them_while_the_rest_waits_for_what_is_being_packed(full):
    """Packing holds the store's lock for minutes; what the catalogue answers does not wait."""
    theirs = [row.series_uid for row in full.rows if row.patient_id == full.gone]
    with locked(Layout(full.store.root).packs / ".lock", wait=True):
        thread = threading.Thread(
            target=withdraw, args=(full.places, full.gone, "operator", "wish")
        )
        thread.start()
        until = time.monotonic() + 30
        while set(full.index.select(permission=TRUE)) & set(theirs):
            assert time.monotonic() < until
        assert thread.is_alive()
        assert full.store.catalogue.of_patient(full.gone)[0]
    thread.join(60)
    assert full.store.catalogue.of_patient(full.gone)[0] == []
