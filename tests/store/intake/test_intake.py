"""What hospitals sent is de-identified, packed when complete, and never lost on the way."""

from __future__ import annotations

import datetime as dt
import threading
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import (
    BasicTextSRStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from kakehashi.errors import StoreError
from kakehashi.store.arrivals_summary import Arrivals
from kakehashi.store.intake import Staging
from kakehashi.store.layout import Layout, locked
from kakehashi.store.receive.arrivals import expect, read_list
from kakehashi.store.receive.figures import day_of

from ..conftest import DATA, files_of
from ..kill import killed
from .conftest import Hospital, open_hospital, send


def read(path: Path) -> pydicom.Dataset:
    return pydicom.dcmread(path)


def identifiers(paths: list[Path]) -> set[bytes]:
    """UIDs and ids of real files, as they must not be found again."""
    found = set()
    for path in paths:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"):
            found.add(str(dataset[name].value).encode())
    return found


def outside(root: Path) -> dict[str, bytes]:
    """Every file of the store but those of the receiver, which are closed to all but it."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.relative_to(root).parts[0] != "receive"
    }


def test_a_series_is_packed_when_nothing_more_of_it_has_come_for_long_enough(hospital):
    hospital.send(files_of("ct_chest"))
    intake = hospital.intake()
    assert intake.take() == 12
    assert intake.finish(quiet_s=3600) == 0
    assert hospital.catalogue.list_series() == []
    assert hospital.waiting() == 0
    assert intake.finish(quiet_s=0) == 1
    (row,) = hospital.catalogue.list_series()
    assert (row.facility, row.slices, row.modality) == ("F01", 12, "CT")
    assert row.patient_id == hospital.deidentifier.patient_id("F01", "CRLM-CT-1004")
    assert list(Staging(hospital.root).list()) == []
    assert intake.progress.taken == 12


def test_nothing_that_names_the_person_leaves_the_receivers_folder(hospital):
    paths = [*files_of("ct_chest"), *sorted((DATA / "sts" / "CT").rglob("*.dcm"))[:8]]
    sought = identifiers(paths)
    hospital.send(paths)
    intake = hospital.intake()
    assert any(word in content for word in sought for content in everything(hospital.root))
    intake.take()
    staged = outside(hospital.root)
    intake.finish(quiet_s=0)
    packed = outside(hospital.root)
    assert len(staged) > 12
    for files in (staged, packed):
        for name, content in files.items():
            assert not [word for word in sought if word in content or word.decode() in name], name


def everything(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in root.rglob("*") if path.is_file()]


def test_the_same_id_at_two_hospitals_is_two_people(hospital):
    hospital.send(files_of("ct_chest"), "F01")
    other = [read(path) for path in files_of("ct_chest")]
    for number, dataset in enumerate(other):
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.8", "1.2.8.1"
        dataset.SOPInstanceUID = f"1.2.8.1.{number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    hospital.send(other, "F02")
    hospital.intake().once()
    one, two = hospital.catalogue.list_series()
    assert {one.facility, two.facility} == {"F01", "F02"}
    assert one.patient_id != two.patient_id


def test_what_comes_again_is_there_once_and_other_content_is_held(hospital):
    hospital.send(files_of("ct_chest"))
    hospital.intake().once()
    before = outside(hospital.root)
    hospital.send(files_of("ct_chest"))
    intake = hospital.intake()
    intake.once()
    assert (intake.progress.again, intake.progress.taken) == (12, 0)
    changed = read(files_of("ct_chest")[3])
    changed.PixelData = bytes(len(changed.PixelData))
    hospital.send([changed])
    intake.once()
    assert hospital.reasons() == ["other content under a UID that is in the store already"]
    assert hospital.waiting() == 0
    after = outside(hospital.root)
    assert {name for name in before if name.endswith(".ozx")} == {
        name for name in after if name.endswith(".ozx") and after[name] == before[name]
    }


def test_other_content_is_held_while_the_first_waits_for_its_series(hospital):
    first = read(files_of("ct_chest")[0])
    hospital.send([first])
    intake = hospital.intake()
    intake.take()
    first.PixelData = bytes(len(first.PixelData))
    hospital.send([first])
    intake.take()
    assert hospital.reasons() == ["other content under a UID that came before"]


def test_structures_and_segmentations_stay_linked_to_their_series(hospital):
    hospital.send(sorted((DATA / "sts" / "CT").rglob("*.dcm")))
    hospital.intake().once()
    (row,) = hospital.catalogue.list_series(modality="CT")
    about = hospital.catalogue.kept_about_series(row.series_uid)
    assert [kept.modality for kept in about] == ["RTSTRUCT"]
    assert about[0].patient_id == row.patient_id


def test_pictures_that_may_show_a_name_are_held_back(hospital):
    capture = read(files_of("ct_chest")[0])
    capture.SOPClassUID = SecondaryCaptureImageStorage
    capture.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    burned = read(files_of("ct_chest")[1])
    burned.BurnedInAnnotation = "YES"
    hospital.send([capture, burned])
    hospital.intake().once()
    assert len(hospital.reasons()) == 2
    assert all(reason.startswith("held back: ") for reason in hospital.reasons())
    assert hospital.catalogue.list_series() == hospital.catalogue.list_kept() == []


def test_a_person_who_withdrew_is_not_taken_in_again(hospital):
    key = hospital.deidentifier.patient_id("F01", "CRLM-CT-1004")
    hospital.catalogue.withdraw(key, "manager", "asked to")
    hospital.send(files_of("ct_chest"))
    intake = hospital.intake()
    intake.once()
    assert intake.progress.withdrawn == 12
    assert hospital.waiting() == 0
    assert outside(hospital.root).keys().isdisjoint({"packs", "kept"})
    assert hospital.catalogue.list_series() == []


def test_a_person_who_withdraws_while_the_series_waits_is_not_packed(hospital):
    hospital.send(files_of("ct_chest"))
    intake = hospital.intake()
    intake.take()
    key = hospital.deidentifier.patient_id("F01", "CRLM-CT-1004")
    hospital.catalogue.withdraw(key, "manager", "asked to")
    intake.finish(quiet_s=0)
    assert hospital.catalogue.list_series() == []
    assert list(Staging(hospital.root).list()) == []


@pytest.fixture
def written() -> pydicom.Dataset:
    """A structured report."""
    heading = pydicom.Dataset()
    heading.CodeValue, heading.CodingSchemeDesignator = "121071", "DCM"
    heading.CodeMeaning = "Finding"
    item = pydicom.Dataset()
    item.RelationshipType, item.ValueType = "CONTAINS", "TEXT"
    item.ConceptNameCodeSequence = [heading]
    item.TextValue = "no nodule"
    report = pydicom.Dataset()
    report.file_meta = pydicom.dataset.FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    report.SOPInstanceUID = report.file_meta.MediaStorageSOPInstanceUID = "1.2.8.2.1"
    report.StudyInstanceUID, report.SeriesInstanceUID = "1.2.8", "1.2.8.2"
    report.PatientID, report.PatientName, report.Modality = "P1", "Yamada^Taro", "SR"
    report.ValueType, report.ContentSequence = "CONTAINER", [item]
    return report


def test_no_report_is_stored_of_a_person_whose_withdrawal_has_ended(hospital, written, monkeypatch):
    key = hospital.deidentifier.patient_id("F01", "P1")
    real = hospital.catalogue.withdrawn

    def withdrawn() -> frozenset[str]:
        """Have the person withdraw when it was just read who has."""
        before = real()
        hospital.catalogue.withdraw(key, "manager", "asked to")
        return before

    monkeypatch.setattr(hospital.catalogue, "withdrawn", withdrawn)
    hospital.send([written])
    intake = hospital.intake()
    intake.take()
    assert (intake.progress.withdrawn, intake.progress.taken) == (1, 0)
    assert (hospital.waiting(), hospital.reasons()) == (0, [])
    assert hospital.reports.withdraw([], key) == 0
    assert list(Staging(hospital.root).list()) == []


def test_a_report_is_stored_while_nobody_can_withdraw(hospital, written, monkeypatch):
    key = hospital.deidentifier.patient_id("F01", "P1")
    real, free = hospital.reports.add, []

    def add(*known: str, **others: str) -> bool:
        try:
            with locked(Layout(hospital.root).packs / ".lock", wait=False):
                free.append(True)
        except StoreError:
            free.append(False)
        return real(*known, **others)

    monkeypatch.setattr(hospital.reports, "add", add)
    hospital.send([written])
    intake = hospital.intake()
    intake.take()
    assert free == [False]
    assert intake.progress.taken == 1
    assert hospital.reports.withdraw([], key) == 1


def test_two_intakes_at_once_are_refused(hospital):
    stop = threading.Event()
    stop.set()
    first, second = hospital.intake(), hospital.intake()
    lock = hospital.root / "staging" / ".lock"
    with lock.open("a") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        for run in (first.once, lambda: second.run(stop)):
            with pytest.raises(StoreError, match="another process"):
                run()


def test_while_the_database_is_away_nothing_is_lost(hospital, monkeypatch):
    hospital.send(files_of("ct_chest"))
    intake = hospital.intake()
    away = threading.Event()
    away.set()
    tried = threading.Event()
    real = hospital.catalogue.withdrawn

    def withdrawn():
        if away.is_set():
            tried.set()
            raise StoreError("the catalogue's database refused: gone")
        return real()

    monkeypatch.setattr(hospital.catalogue, "withdrawn", withdrawn)
    monkeypatch.setattr("kakehashi.store.intake.intake.PAUSE_S", 0.01)
    stop = threading.Event()
    worker = threading.Thread(target=intake.run, args=(stop,))
    worker.start()
    try:
        assert tried.wait(30)
        assert send(hospital.inbox, files_of("mr_adc")[0]) == "stored"
        assert hospital.waiting() == 13
        away.clear()
        while intake.progress.taken < 13:
            assert worker.is_alive()
    finally:
        stop.set()
        worker.join(60)
    assert hospital.waiting() == 0


def test_killed_anywhere_it_ends_with_the_same_store(hospital, tmp_path):
    sent = [*files_of("ct_chest"), *files_of("mr_adc")]
    hospital.send(sent)

    def work() -> None:
        open_hospital(hospital.config).intake().once()

    # Each run goes on where the one before was cut off, and is cut off at another place.
    cuts = sum(killed(hospital.root, number, work) for number in range(1, 30))
    assert cuts > 10
    while killed(hospital.root, 1000, work):
        cuts += 1
    assert hospital.waiting() == 0
    assert hospital.reasons() == []
    packs = {row.series_uid: row for row in hospital.catalogue.list_series()}
    assert sorted(row.slices for row in packs.values()) == [4, 12]

    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "secrets").mkdir(mode=0o700)
    key = hospital.root / "secrets" / "deidentification"
    (whole / "secrets" / "deidentification").write_bytes(key.read_bytes())
    (whole / "secrets" / "deidentification").chmod(0o600)
    from kakehashi.config import Config

    from ..conftest import settings

    other: Hospital = open_hospital(Config.model_validate(settings(whole)))
    other.send(sent)
    other.intake().once()
    for row in other.catalogue.list_series():
        mine = Layout(hospital.root).absolute(packs[row.series_uid].path)
        assert mine.read_bytes() == Layout(whole).absolute(row.path).read_bytes()
    assert not list(hospital.root.rglob("*.part"))


def test_the_portal_gets_figures_that_name_nobody(hospital, tmp_path):
    sent = files_of("ct_chest")
    table = tmp_path / "list.csv"
    study = str(read(sent[0]).StudyInstanceUID)
    today = day_of(dt.datetime.now(dt.UTC)).isoformat()
    table.write_text(f"date,study_uid,instances\n{today},{study},14\n{today},1.2.3.4,3\n")
    expect(hospital.inbox.folders.expected, "F01", read_list(table))
    hospital.send(sent)
    burned = read(sent[1])
    burned.BurnedInAnnotation = "YES"
    burned.SOPInstanceUID = burned.file_meta.MediaStorageSOPInstanceUID = "1.2.3.77"
    hospital.send([burned])
    hospital.send(files_of("mr_adc"), "東京病院")
    intake = hospital.intake()
    intake.take()
    intake.once()
    found = Arrivals.load(hospital.root / "arrivals.json")
    days = {one.facility: one.days[0] for one in found.facilities}
    assert (days["F01"].expected, days["F01"].missing, days["F01"].studies_missing) == (17, 4, 2)
    assert days["F01"].received == 13
    assert (days["東京病院"].expected, days["東京病院"].received) == (None, 4)
    (held,) = found.quarantine
    assert (held.facility, held.held_back, held.count) == ("F01", True, 1)
    assert found.waiting.series == 0
    content = (hospital.root / "arrivals.json").read_bytes()
    assert not [word for word in identifiers([*sent, *files_of("mr_adc")]) if word in content]
