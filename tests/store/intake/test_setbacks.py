"""Whatever goes wrong with one object or one series, the others go on and nothing is lost."""

from __future__ import annotations

import datetime as dt
import threading
from pathlib import Path

import pydicom
import pytest

from kakehashi.errors import StoreError
from kakehashi.store.intake import Staging, intake
from kakehashi.store.receive.figures import day_of

from ..conftest import files_of
from .conftest import Hospital


def staged(hospital: Hospital) -> list[str]:
    return [one.series for one in Staging(hospital.root).list()]


def aside(hospital: Hospital) -> list[str]:
    folders = (hospital.root / "staging" / ".aside").glob("*")
    return [folder.name.rsplit(".", 1)[0] for folder in folders]


@pytest.fixture
def two(hospital) -> tuple[str, str]:
    """Two series in staging, sorted."""
    hospital.send([*files_of("ct_chest"), *files_of("mr_adc")])
    hospital.intake().take()
    first, second = staged(hospital)
    return first, second


@pytest.fixture
def breaks(monkeypatch):
    """Have the packing of one series fail."""
    real = intake.add

    def breaking(series: str, error: Exception) -> None:
        def add(store, catalogue, sources, **others):
            if sources[0].parent.name == series:
                raise error
            return real(store, catalogue, sources, **others)

        monkeypatch.setattr(intake, "add", add)

    yield breaking
    monkeypatch.setattr(intake, "add", real)


def test_a_series_that_breaks_the_packing_is_set_aside_and_the_others_go_on(hospital, two, breaks):
    breaks(two[0], KeyError("山田"))
    hospital.intake().once()
    assert [row.series_uid for row in hospital.catalogue.list_series()] == [two[1]]
    assert staged(hospital) == []
    assert aside(hospital) == [two[0]]


def test_what_breaks_is_not_quoted_in_the_log(hospital, two, breaks, caplog):
    breaks(two[0], KeyError("山田"))
    hospital.intake().once()
    assert "KeyError" in caplog.text
    assert "山田" not in caplog.text


def test_a_series_that_fails_waits_longer_and_longer_and_is_packed_when_it_can(
    hospital, two, breaks, monkeypatch
):
    breaks(two[0], StoreError("not now"))
    now = [1e12]
    worker = hospital.intake(clock=lambda: now[0])
    assert worker.finish(quiet_s=0) == 1
    assert staged(hospital) == [two[0]]
    tries = []
    failing = intake.add
    monkeypatch.setattr(intake, "add", lambda *a, **b: (tries.append(now[0]), failing(*a, **b))[1])
    for _ in range(100):
        now[0] += 1
        assert worker.finish(quiet_s=0) == 0
    assert 3 <= len(tries) <= 8
    breaks("none", StoreError())
    now[0] += 1000
    assert worker.finish(quiet_s=0) == 1
    assert len(hospital.catalogue.list_series()) == 2
    assert aside(hospital) == []


def test_a_run_to_the_end_says_that_something_waits(hospital, two, breaks):
    breaks(two[0], StoreError("not now"))
    with pytest.raises(StoreError, match="1 series could not be packed"):
        hospital.intake().once()
    assert len(hospital.catalogue.list_series()) == 1


def test_a_series_whose_origin_is_damaged_holds_up_none(hospital, two):
    (hospital.root / "staging" / two[0] / "origin.json").write_text("{")
    hospital.intake().once()
    assert [row.series_uid for row in hospital.catalogue.list_series()] == [two[1]]
    assert aside(hospital) == [two[0]]


def test_who_withdraws_leaves_nothing_that_was_set_aside(hospital, two, breaks):
    breaks(two[0], KeyError())
    hospital.intake().once()
    patient = hospital.catalogue.list_series()[0].patient_id
    assert Staging(hospital.root).withdraw(patient) == 0
    (folder,) = (hospital.root / "staging" / ".aside").iterdir()
    objects = [pydicom.dcmread(path) for path in folder.glob("*.dcm")]
    assert Staging(hospital.root).withdraw(str(objects[0].PatientID)) == 1
    assert aside(hospital) == []


@pytest.mark.parametrize("error", [KeyError("山田"), StoreError("refused")])
def test_an_object_that_cannot_be_staged_is_held_and_the_others_go_on(
    hospital, monkeypatch, error, caplog
):
    hospital.send(files_of("ct_chest"))
    worker = hospital.intake()
    real, bad = Staging.put, []

    def put(self, series, sop, *others):
        bad.append(sop)
        if sop == bad[0]:
            raise error
        return real(self, series, sop, *others)

    monkeypatch.setattr(Staging, "put", put)
    monkeypatch.setattr(intake, "PAUSE_S", 0.01)
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    try:
        while worker.progress.taken < 11:
            assert thread.is_alive()
    finally:
        stop.set()
        thread.join(60)
    assert hospital.reasons() == ["cannot be taken over: the intake's log has the reason"]
    assert hospital.waiting() == 0
    assert "山田" not in caplog.text


def test_what_nobody_thought_of_does_not_end_the_intake(hospital, monkeypatch):
    hospital.send(files_of("ct_chest")[:1])
    worker = hospital.intake()
    failed = threading.Event()
    real = hospital.catalogue.withdrawn

    def withdrawn():
        if not failed.is_set():
            failed.set()
            raise ZeroDivisionError
        return real()

    monkeypatch.setattr(hospital.catalogue, "withdrawn", withdrawn)
    monkeypatch.setattr(intake, "PAUSE_S", 0.01)
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    try:
        while worker.progress.taken < 1:
            assert thread.is_alive()
    finally:
        stop.set()
        thread.join(60)
    assert failed.is_set()


def test_a_journal_that_was_lost_is_read_from_its_beginning(hospital):
    hospital.send(files_of("ct_chest")[:2])
    hospital.intake().take()
    position = hospital.root / "staging" / ".position.json"
    assert position.exists()
    position.write_text('{"position": 999999999999999999}')
    hospital.send(files_of("ct_chest")[2:4])
    worker = hospital.intake()
    worker.once()
    assert (worker.progress.taken, hospital.waiting()) == (2, 0)


def test_figures_that_cannot_be_written_down_keep_nothing_waiting(hospital, caplog):
    today = day_of(dt.datetime.now(dt.UTC))
    (hospital.inbox.folders.figures / f"{today}.json").write_text("{")
    hospital.send(files_of("ct_chest")[:1])
    hospital.intake().once()
    assert len(hospital.catalogue.list_series()) == 1
    assert "no figures for the portal" in caplog.text


def test_of_what_waits_only_that_is_read_again_of_which_more_came(hospital, two, monkeypatch):
    staging, read = Staging(hospital.root), []
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        read.append(path.parent.name)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    before = {one.series: one for one in staging.list()}
    assert sorted(before) == sorted(read) == sorted(two)
    assert {one.series: one for one in staging.list()} == before
    assert len(read) == 2
    one = before[two[0]]
    assert staging.put(one.series, "1.2.3", one.origin, one.patient, b"more") == ""
    read.clear()
    after = {one.series: one for one in staging.list()}
    assert after[two[0]].objects == one.objects + 1
    assert after[two[1]] == before[two[1]]
    assert read == [two[0]]
    # Another process removes what is withdrawn.
    Staging(hospital.root).remove(one)
    assert [one.series for one in staging.list()] == [two[1]]


def test_staging_is_looked_through_now_and_then_while_objects_come(hospital, monkeypatch):
    now, stop, steps = [1e9], threading.Event(), []
    worker = hospital.intake(clock=lambda: now[0])
    taken = iter([1, 1, 1, 1, 0])

    def take() -> int:
        steps.append("take")
        if steps.count("take") == 4:
            now[0] += intake.PASS_S
        count = next(taken)
        if not count:
            stop.set()
        return count

    monkeypatch.setattr(worker, "take", take)
    monkeypatch.setattr(worker, "finish", lambda: steps.append("finish") or 0)
    worker.run(stop)
    # At once; when it is time; and when no more comes.
    assert " ".join(steps) == "take finish take take take finish take finish"


def test_half_files_of_killed_runs_are_looked_for_once_and_again_after_a_while(hospital, two):
    worker = hospital.intake()
    half = hospital.root / "packs" / "zz" / "1.2.3.ozx.part"
    half.parent.mkdir()
    half.write_bytes(b"half")
    assert worker.finish(quiet_s=0) == 2
    assert not half.exists()
    half.write_bytes(b"half")
    hospital.send(files_of("mr_rle"))
    worker.once()
    assert half.exists()
    hospital.send(files_of("pet_uneven"))
    worker.once()
    assert not half.exists()
