"""The catalogue behaves the same on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import dataclasses
import datetime as dt
import sqlite3
from pathlib import Path

import pytest

from kakehashi.config import CohortQuery, Config
from kakehashi.errors import StoreError
from kakehashi.store.catalogue import Catalogue, Cohort, Kept, Series
from kakehashi.store.permission import scope

from .conftest import DATA, StoreUnderTest, settings

ROW = Series(
    series_uid="1.2.3",
    study_uid="1.2",
    patient_id="患者-1",
    modality="CT",
    body_part="胸部",
    manufacturer="キヤノン",
    vendor="CANON",
    model=None,
    kernel="FC51",
    description="造影 \\ 5mm",
    study_date=dt.date(2024, 2, 29),
    rows=512,
    columns=512,
    slices=300,
    volumes=1,
    usable_3d=True,
    spacing_z=0.1 + 0.2,
    spacing_y=0.5,
    spacing_x=0.5,
    thickness=None,
    orientation="axial",
    kvp=120.0,
    exposure=81.5,
    contrast=True,
    sex="F",
    age=61.0,
    transfer_syntax="1.2.840.10008.1.2.1",
    flags=("tilted",),
    facility="F01",
    tier=2,
    path="packs/aa/1.2.3.ozx",
    size=5_000_000_000,
    blocks="a" * 64,
    added_at="2026-01-01T00:00:00Z",
)
PROJECT = (
    Config.model_validate(settings(Path("/nowhere"))).projects[0].model_copy(update={"tier": 3})
)
KEPT = Kept(
    sha256="b" * 64,
    sop_uid="1.2.3.4",
    series_uid="1.2.9",
    study_uid="1.2",
    patient_id="患者-1",
    tier=2,
    modality="RTSTRUCT",
    reason="RT Structure Set Storage: not a CT, MR or PET image",
    path="kept/bb/1.2.3.4.dcm",
    size=7,
    added_at="2026-01-01T00:00:00Z",
    refers_to=("1.2.3", "1.2.4"),
)


def test_a_row_comes_back_as_it_was(catalogue, database):
    catalogue.add_series(ROW)
    assert catalogue.series(ROW.series_uid) == ROW
    assert catalogue.series("9") is None
    again = Catalogue.open(database.need_store())
    assert again.list_series() == [ROW]
    again.close()


def test_a_series_is_there_once(catalogue):
    catalogue.add_series(ROW)
    with pytest.raises(StoreError, match="refused") as caught:
        catalogue.add_series(dataclasses.replace(ROW, modality="MR"))
    assert "患者" not in str(caught.value)
    assert catalogue.list_series() == [ROW]


def test_a_cohort_is_what_its_conditions_say(catalogue):
    rows = [
        dataclasses.replace(ROW, series_uid=f"1.{n}", modality=modality, body_part=part)
        for n, (modality, part) in enumerate(
            [("CT", "CHEST"), ("CT", None), ("MR", "CHEST"), ("PT", "HEAD")]
        )
    ]
    for row in reversed(rows):
        catalogue.add_series(row)

    def select(**conditions: set[str]) -> list[str]:
        asked = scope(PROJECT.model_copy(update={"cohort": CohortQuery(**conditions)}))
        return [r.series_uid for r in catalogue.select(asked)]

    assert select() == ["1.0", "1.1", "1.2", "1.3"]
    assert select(modality={"CT", "PT"}) == ["1.0", "1.1", "1.3"]
    assert select(modality={"CT"}, body_part={"CHEST"}) == ["1.0"]
    assert select(body_part={"CHEST"}) == ["1.0", "1.2"]
    assert select(manufacturer={"x"}) == []
    assert select(series={"1.2", "9"}) == ["1.2"]
    assert [r.series_uid for r in catalogue.list_series(modality="MR")] == ["1.2"]
    assert len(catalogue.list_series(study="1.2")) == 4


def test_kept_objects_are_found_by_series_and_by_reference(catalogue):
    catalogue.add_kept(KEPT)
    assert catalogue.kept(KEPT.sha256) == KEPT
    assert catalogue.list_kept() == catalogue.list_kept(modality="RTSTRUCT") == [KEPT]
    assert catalogue.list_kept(modality="SEG") == []
    for series in ("1.2.3", "1.2.4", "1.2.9"):
        assert catalogue.kept_about_series(series) == [KEPT]
    assert catalogue.kept_about_series("1.2.5") == []
    assert catalogue.kept_of_series("1.2.9") == [KEPT]
    assert catalogue.kept_of_series("1.2.3") == []


def test_a_kept_object_gets_a_new_reason(catalogue):
    catalogue.add_kept(KEPT)
    changed = dataclasses.replace(KEPT, reason="other", refers_to=("1.2.4",))
    catalogue.add_kept(changed)
    assert catalogue.list_kept() == [changed]


def test_kept_objects_can_be_dropped(catalogue):
    other = dataclasses.replace(KEPT, sha256="c" * 64)
    catalogue.add_kept(KEPT)
    catalogue.add_kept(other)
    assert catalogue.drop_kept([KEPT.sha256, "d" * 64]) == [KEPT]
    assert catalogue.list_kept() == [other]
    assert catalogue.drop_kept([]) == []


def test_the_newest_cohort_counts(catalogue):
    assert catalogue.cohort("lung") is None
    cohorts = [
        Cohort(project="lung", version=n, sha256="e" * 64, series=("1", "2"), frozen_at="x")
        for n in (1, 2, 10)
    ]
    for cohort in cohorts:
        catalogue.add_cohort(cohort)
    assert catalogue.cohort("lung") == cohorts[-1]
    assert catalogue.cohort("other") is None


def test_real_series_go_in(catalogue, database):
    store = StoreUnderTest(database, catalogue, database.need_store().root)
    report = store.add(DATA / "ct_tilted", DATA / "charset", DATA / "mr_adc")
    assert len(report.packed) == 2
    assert {row.series_uid for row in catalogue.list_series()} == {
        row.series_uid for row in report.packed
    }
    assert len(catalogue.list_kept()) == len({kept.sha256 for kept in report.kept})


def test_a_missing_root_is_a_clear_error(tmp_path):
    config = Config.model_validate(settings(tmp_path / "none"))
    with pytest.raises(StoreError, match="kakehashi store init"):
        Catalogue.open(config.need_store())


def test_a_bad_url_does_not_show_its_password(tmp_path):
    for url in ("nonsense://u:hunter2@host/x", "hunter2"):
        config = Config.model_validate(settings(tmp_path, database=url))
        with pytest.raises(StoreError, match=r"store\.database") as caught:
            Catalogue.open(config.need_store())
        assert "hunter2" not in str(caught.value)


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path):
    (tmp_path / "catalogue.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        Catalogue.open(Config.model_validate(settings(tmp_path)).need_store())


def test_a_catalogue_of_an_earlier_release_gets_the_new_columns(tmp_path):
    store = Config.model_validate(settings(tmp_path)).need_store()
    catalogue = Catalogue.open(store)
    catalogue.add_series(ROW)
    catalogue.close()
    new = {"facility": "", "tier": 1, "vendor": None, "volumes": 1, "usable_3d": False}
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as database:
        database.execute("DROP INDEX ix_series_facility")
        for column in (*new, "exposure"):
            database.execute(f"ALTER TABLE series DROP COLUMN {column}")
    catalogue = Catalogue.open(store)
    assert catalogue.series(ROW.series_uid) == dataclasses.replace(ROW, exposure=None, **new)
    catalogue.close()
