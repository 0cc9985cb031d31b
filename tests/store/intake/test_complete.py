"""A series is packed when it is known to be whole, and waits, not for ever, while it is not."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from kakehashi.store.indexing import opened
from kakehashi.store.ingest import AddReport
from kakehashi.store.intake import Staging, intake
from kakehashi.store.intake.complete import LOOK_S, SETTLE_S, Count, Known, Rule, complete
from kakehashi.store.query import TRUE
from kakehashi.store.receive.arrivals import expect
from kakehashi.store.receive.entry import Entry, Receipt
from kakehashi.store.receive.figures import day_of

from ..made import Slice, stack, write
from .conftest import Hospital

RULE = Rule(settle_s=30, quiet_s=600, patience_s=86400)
SHORT, FULL = Count(50, 100), Count(100, 100)
QUIET_S, PATIENCE_S = 10 * 60, 24 * 3600  # what the settings say unless told


@pytest.mark.parametrize(
    ("waits_s", "known"),
    [
        (600, Known(0)),
        (30, Known(0, series=FULL)),
        (30, Known(0, series=Count(101, 100))),
        (86400, Known(0, series=SHORT)),
        (30, Known(0, study=FULL)),
        (86400, Known(0, study=SHORT)),
        # Its own number is nearer than that of its study.
        (30, Known(0, series=FULL, study=SHORT)),
        (86400, Known(0, series=SHORT, study=FULL)),
        # An acquisition may have given other series too.
        (30, Known(0, acquired=FULL)),
        (600, Known(0, acquired=SHORT)),
        (30, Known(0, acquired=FULL, study=SHORT)),
        (86400, Known(0, whole=False)),
        # That all have come is known: to wait would not mend it.
        (30, Known(0, series=FULL, whole=False)),
        (30, Known(0, study=FULL, whole=False)),
    ],
)
def test_a_number_that_is_reached_ends_the_wait_and_one_that_is_not_makes_it_longer(waits_s, known):
    assert not complete(known, RULE, waits_s - 1)
    assert complete(known, RULE, waits_s)


def test_what_is_still_arriving_is_never_complete():
    assert not complete(Known(0, arriving=True, series=FULL), RULE, 10 * 86400)


def test_a_count_says_how_many_of_how_many():
    assert str(SHORT) == "50 of 100 objects"
    assert [SHORT.reached, FULL.reached] == [False, True]


class Waiting:
    """An intake whose clock is moved by the test."""

    def __init__(self, hospital: Hospital) -> None:
        self.hospital, self.later_s = hospital, 0.0
        self.intake = hospital.intake(clock=lambda: time.time() + self.later_s)

    def send(self, *paths: Path) -> None:
        self.hospital.send(paths)
        self.intake.take()

    def after(self, seconds: float) -> int:
        """Return how many series were packed or kept so long after now."""
        self.later_s = seconds
        return self.intake.finish()

    def slices(self) -> list[int]:
        return [row.slices for row in self.hospital.catalogue.list_series()]


@pytest.fixture
def waiting(hospital) -> Waiting:
    return Waiting(hospital)


@pytest.fixture
def images(tmp_path) -> Callable[..., list[Path]]:
    """Make a CT of 8 slices, with further attributes."""

    def make(count: int = 8, series: str = "1.2.9", **attributes: object) -> list[Path]:
        def own(dataset: pydicom.Dataset) -> None:
            dataset.SeriesInstanceUID = series
            dataset.SOPInstanceUID = dataset.SOPInstanceUID.replace("1.2.9", series)
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID

        slices = [Slice(k=one.k, attributes=attributes, change=own) for one in stack(count)]
        return write(tmp_path / "made" / series, slices, "CT")

    return make


def sent_list(hospital: Hospital, **studies: int) -> None:
    """Take a list of today, by the study's UID with ``_`` for a dot."""
    today = day_of(dt.datetime.now(dt.UTC))
    listed = {uid.strip("_").replace("_", "."): count for uid, count in studies.items()}
    expect(hospital.inbox.folders.expected, "F01", {today: listed})


def test_without_a_number_a_series_waits_for_silence(waiting, images):
    waiting.send(*images())
    assert waiting.after(QUIET_S - 20) == 0
    assert waiting.after(QUIET_S + 1) == 1
    assert waiting.slices() == [8]


@pytest.mark.parametrize("name", ["NumberOfSeriesRelatedInstances", "ImagesInAcquisition"])
def test_a_series_that_says_how_many_it_has_is_packed_as_soon_as_they_are_there(
    waiting, images, name
):
    paths = images(**{name: 8, "AcquisitionNumber": 1})
    waiting.send(*paths[:7])
    assert waiting.after(SETTLE_S + 1) == 0
    waiting.send(paths[7])
    assert waiting.after(SETTLE_S / 2) == 0
    assert waiting.after(SETTLE_S + 1) == 1
    assert waiting.slices() == [8]


def test_a_list_of_the_hospital_ends_the_wait_for_all_series_of_a_study(waiting, images):
    one, two = images(), images(4, "1.2.10")
    sent_list(waiting.hospital, _1_2_8=12)
    waiting.send(*one)
    assert waiting.after(QUIET_S + 1) == 0
    waiting.send(*two)
    # What was found a moment ago counts until the next look.
    assert waiting.after(QUIET_S + 2) == 0
    assert waiting.after(QUIET_S + LOOK_S + 2) == 2
    assert sorted(waiting.slices()) == [4, 8]
    assert [row.flags for row in waiting.hospital.catalogue.list_series()] == [(), ()]


def test_the_list_of_another_hospital_says_nothing(waiting, images):
    today = day_of(dt.datetime.now(dt.UTC))
    expect(waiting.hospital.inbox.folders.expected, "F02", {today: {"1.2.8": 100}})
    waiting.send(*images())
    assert waiting.after(QUIET_S + 1) == 1


@pytest.mark.parametrize(
    ("what", "raw"),
    [
        ("figures", "{"),
        ("figures", '{"until": 0, "facilities": []}'),
        ("expected", "{"),
        ("expected", '{"F01": {"1.2.8": "12"}}'),
    ],
)
def test_a_damaged_list_counts_as_none_and_is_told_of_once(waiting, images, caplog, what, raw):
    hospital = waiting.hospital
    waiting.send(*images())
    assert waiting.after(QUIET_S - LOOK_S - 10) == 0
    today = day_of(dt.datetime.now(dt.UTC))
    (getattr(hospital.inbox.folders, what) / f"{today}.json").write_text(raw)
    assert waiting.after(QUIET_S - 5) == 0
    assert waiting.after(QUIET_S + LOOK_S) == 1
    assert waiting.slices() == [8]
    assert list(hospital.root.glob("staging/.aside/*")) == []
    assert caplog.text.count("hospitals' lists cannot be read") == 1


def test_a_row_of_a_time_that_cannot_be_holds_up_no_packing(waiting, images):
    hospital = waiting.hospital
    waiting.send(*images())
    odd = Receipt(
        **dict.fromkeys(Receipt.__slots__, "")
        | {"received_at": dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-9)))}
        | {"size": 1}
    )
    with hospital.inbox.journal.held():
        hospital.inbox.journal.append([{"kind": "again", **odd.as_json()}])
    assert waiting.after(QUIET_S + 1) == 1
    assert waiting.slices() == [8]


def test_what_an_object_says_of_its_study_counts_where_no_list_does(waiting, images):
    waiting.send(*images(NumberOfStudyRelatedInstances=12))
    assert waiting.after(QUIET_S + 1) == 0
    waiting.send(*images(4, "1.2.10"))
    assert waiting.after(QUIET_S + LOOK_S + 2) == 2


def test_a_series_with_a_gap_waits_for_what_may_fill_it(waiting, images):
    paths = images()
    waiting.send(*paths[:3], *paths[5:])
    assert waiting.after(QUIET_S + 1) == 0
    waiting.send(*paths[3:5])
    assert waiting.after(QUIET_S + 2) == 1
    assert waiting.slices() == [8]


def test_a_gap_that_nothing_fills_is_refused_when_patience_ends(waiting, images):
    paths = images()
    waiting.send(*paths[:3], *paths[5:])
    assert waiting.after(PATIENCE_S + 1) == 1
    kept = waiting.hospital.catalogue.list_kept()
    assert len(kept) == 6
    assert all(one.reason.startswith("gap: ") for one in kept)


def test_what_waits_in_the_inbox_is_waited_for(waiting, images):
    paths = images()
    waiting.send(*paths[:7])
    waiting.hospital.send([paths[7]])
    assert waiting.after(PATIENCE_S + 1) == 0
    waiting.intake.take()
    assert waiting.after(PATIENCE_S + LOOK_S + 2) == 1
    assert waiting.slices() == [8]


def test_a_look_that_takes_longer_than_between_two_is_done_once_for_all_series(
    waiting, images, monkeypatch
):
    waiting.send(*images(4), *images(4, "1.2.10"), *images(4, "1.2.11"))
    inbox, looks = waiting.hospital.inbox, []
    real = inbox.entries

    def entries(after: int = 0) -> Iterator[Entry]:
        looks.append(after)
        waiting.later_s += 2 * LOOK_S
        return real(after)

    monkeypatch.setattr(inbox, "entries", entries)
    assert waiting.after(SETTLE_S + 1) == 0
    assert len(looks) == 1
    assert waiting.intake.finish() == 0
    assert len(looks) == 1
    # The control: it is done again when it is time.
    waiting.later_s += LOOK_S
    assert waiting.intake.finish() == 0
    assert len(looks) == 2


def test_what_comes_while_others_are_packed_is_not_taken_for_silence(waiting, images, monkeypatch):
    waiting.send(*images(4), *images(4, "1.2.10"))
    real = intake.add

    def slow(*known: Any, **others: Any) -> AddReport:
        waiting.later_s += 2 * PATIENCE_S
        return real(*known, **others)

    monkeypatch.setattr(intake, "add", slow)
    _, second = Staging(waiting.hospital.root).list()
    for path in second.folder.glob("*.dcm"):
        os.utime(path, (second.last + 60, second.last + 60))
    # Not counted from the end of the other's packing, before which nothing is taken.
    assert waiting.after(QUIET_S + 1) == 1
    assert len(waiting.slices()) == 1


def test_once_takes_what_is_there(waiting, images):
    waiting.send(*images(NumberOfSeriesRelatedInstances=80))
    waiting.intake.once()
    assert waiting.slices() == [8]
    assert list(Staging(waiting.hospital.root).list()) == []


def test_a_series_of_which_some_is_missing_is_packed_when_patience_ends_and_says_so(
    waiting, images, caplog
):
    paths = images(NumberOfSeriesRelatedInstances=8)
    waiting.send(*paths[:6])
    assert waiting.after(PATIENCE_S - 20) == 0
    assert waiting.after(PATIENCE_S + 1) == 1
    (row,) = waiting.hospital.catalogue.list_series()
    assert (row.slices, row.flags) == (6, ("incomplete",))
    assert "6 of 8 objects" in caplog.text


def test_of_a_study_that_stays_short_every_series_says_so_until_the_rest_has_come(waiting, images):
    catalogue = waiting.hospital.catalogue
    sent_list(waiting.hospital, _1_2_8=12)
    waiting.send(*images())
    assert waiting.after(PATIENCE_S + 1) == 1
    assert [row.flags for row in catalogue.list_series()] == [("incomplete-study",)]
    (before,) = catalogue.list_series()
    waiting.send(*images(4, "1.2.10"))
    assert waiting.after(PATIENCE_S + LOOK_S + 2) == 1
    rows = {row.slices: row for row in catalogue.list_series()}
    assert [row.flags for row in rows.values()] == [(), ()]
    assert rows[8].blocks == before.blocks


def test_a_series_that_is_whole_by_its_own_number_is_not_blamed_for_its_study(waiting, images):
    sent_list(waiting.hospital, _1_2_8=12)
    waiting.send(*images(NumberOfSeriesRelatedInstances=8))
    assert waiting.after(SETTLE_S + 1) == 1
    assert [row.flags for row in waiting.hospital.catalogue.list_series()] == [()]


def test_late_slices_are_packed_too(waiting, images):
    paths = images()
    waiting.send(*paths[:5])
    assert waiting.after(QUIET_S + 1) == 1
    waiting.send(*paths[5:])
    assert waiting.after(QUIET_S + LOOK_S + 2) == 1
    assert waiting.slices() == [8]
    assert waiting.hospital.catalogue.list_kept() == []
    found = opened(waiting.hospital.config.need_store())
    (row,) = waiting.hospital.catalogue.list_series()
    assert found.lookup(row.series_uid, permission=TRUE, columns=("slices",)) == {"slices": 8}
