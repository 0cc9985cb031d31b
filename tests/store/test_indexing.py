"""The index of facets says what the catalogue says, whatever was cut off or put back before."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from kakehashi.cli.store import app as store_commands
from kakehashi.store.catalogue import _SERIES, Series
from kakehashi.store.facets import Index
from kakehashi.store.facets.compare import Comparison
from kakehashi.store.indexing import catch_up, enter, opened
from kakehashi.store.layout import Layout
from kakehashi.store.query import TRUE

from .conftest import files_of
from .facets.cases import table

ROWS = table(5, 30)
BY_UID = {row.series_uid: row for row in ROWS}


@pytest.fixture
def level(store):
    """A catalogue of all rows but the last, and an index level with it."""
    host = store.config.need_store()
    Layout(store.root).packs.mkdir()
    for row in ROWS[:-1]:
        store.catalogue.add_series(row)
    made = SimpleNamespace(
        host=host, catalogue=store.catalogue, index=opened(host), root=store.root, compared=[]
    )
    assert catch_up(host, store.catalogue, made.index) == (len(ROWS) - 1, 0)
    return made


@pytest.fixture
def compared(level, monkeypatch):
    """Every row that is looked at in a comparison of all."""
    whole = Comparison.differing
    monkeypatch.setattr(
        Comparison,
        "differing",
        lambda self, rows: level.compared.extend(rows) or whole(self, rows),
    )
    return level.compared


def indexed(index: Index) -> dict[str, object]:
    return {row["series_uid"]: row["slices"] for row in index.page(permission=TRUE).rows}


def recorded(catalogue) -> dict[str, object]:
    return {row.series_uid: row.slices for batch in catalogue.batches(7) for row in batch}


def is_level(made) -> bool:
    return indexed(made.index) == recorded(made.catalogue)


def test_where_nothing_changed_nothing_is_looked_at(level, compared):
    generation = level.index.generation
    assert catch_up(level.host, level.catalogue, level.index) == (0, 0)
    assert level.index.generation == generation
    assert compared == []


def test_what_was_packed_before_a_run_was_cut_off_is_added_without_a_look_at_the_rest(
    level, compared
):
    level.catalogue.add_series(ROWS[-1])
    assert not is_level(level)
    assert catch_up(level.host, level.catalogue, level.index) == (1, 0)
    assert is_level(level)
    assert compared == []


def test_what_was_packed_just_now_is_entered_and_not_looked_at_again(level, compared):
    level.catalogue.add_series(ROWS[-1])
    enter(level.host, level.catalogue, level.index, [ROWS[-1]])
    assert is_level(level)
    generation = level.index.generation
    assert catch_up(level.host, level.catalogue, level.index) == (0, 0)
    assert level.index.generation == generation
    assert compared == []


def test_a_new_index_is_level_from_the_first_series_on(store):
    host = store.config.need_store()
    Layout(store.root).packs.mkdir()
    made = SimpleNamespace(index=opened(host), catalogue=store.catalogue)
    for row in ROWS[:3]:
        store.catalogue.add_series(row)
        enter(host, store.catalogue, made.index, [row])
        assert is_level(made)
        assert store.catalogue.changes() == []


def test_what_is_added_by_hand_makes_the_index_level(level, tmp_path):
    """Also with an index of another time; otherwise the list of changes would only grow."""
    settings = tmp_path / "kakehashi.toml"
    settings.write_text(f'[store]\nroot = "{level.root}"\naddress = "store.example"\n')
    level.catalogue.add_series(ROWS[-1])
    level.catalogue.followed([], "another")
    command = ["add", *map(str, files_of("mr_jpeg2000")), "--config", str(settings)]
    done = CliRunner().invoke(store_commands, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert level.catalogue.count() == len(ROWS) + 1
    assert is_level(level)
    assert level.catalogue.changes() == []


def test_a_row_too_many_does_not_hide_one_that_is_missing(level):
    """As many rows on both sides are not the same rows."""
    copy = shutil.copytree(Layout(level.root).facets, level.root / "copy")
    gone = ROWS[3]
    level.index.withdraw([gone.series_uid])
    level.catalogue.forget([gone.series_uid], [])
    level.catalogue.add_series(ROWS[-1])
    enter(level.host, level.catalogue, level.index, [ROWS[-1]])
    # The index of before comes back: it has one that is gone, and lacks one that came.
    shutil.rmtree(Layout(level.root).facets)
    copy.rename(Layout(level.root).facets)
    index = level.index = Index.open(Layout(level.root).facets)
    assert index.rows == level.catalogue.count()
    assert not is_level(level)
    assert catch_up(level.host, level.catalogue, index) == (1, 1)
    assert is_level(level)


def test_rows_that_the_catalogue_has_no_more_are_taken_out(level):
    """Someone restored the catalogue from a backup that was older than the series."""
    with level.catalogue.transaction() as connection:
        connection.execute(sa.delete(_SERIES).where(_SERIES.c.series_uid == ROWS[0].series_uid))
    assert not is_level(level)
    assert catch_up(level.host, level.catalogue, level.index) == (0, 1)
    assert is_level(level)


def test_a_catalogue_of_another_time_is_compared_row_by_row(level, compared):
    changed = dataclasses.replace(ROWS[1], slices=4711)
    with level.catalogue.transaction() as connection:
        same = _SERIES.c.series_uid == changed.series_uid
        connection.execute(sa.update(_SERIES).where(same).values(slices=4711))
    level.catalogue.followed([], "another")
    assert level.index.rows == level.catalogue.count()
    assert catch_up(level.host, level.catalogue, level.index) == (1, 0)
    assert indexed(level.index)[changed.series_uid] == 4711
    assert len(compared) == len(ROWS) - 1
    assert catch_up(level.host, level.catalogue, level.index) == (0, 0)
    assert len(compared) == len(ROWS) - 1


def test_an_index_that_says_the_same_is_left_as_it_is(level):
    """Control of the comparison: unknown values, flags, zeros and odd names are no difference."""
    level.catalogue.followed([], "another")
    assert catch_up(level.host, level.catalogue, level.index) == (0, 0)
    assert level.index.segments == 1


def test_a_run_that_is_killed_between_both_marks_loses_nothing(level, monkeypatch):
    level.catalogue.add_series(ROWS[-1])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(level.catalogue, "followed", killed)
        with pytest.raises(KeyboardInterrupt):
            enter(level.host, level.catalogue, level.index, [ROWS[-1]])
    assert catch_up(level.host, level.catalogue, level.index) == (0, 0)
    assert is_level(level)
    assert level.catalogue.changes() == []


def test_a_person_who_withdrew_is_not_brought_back(level):
    """Noted as withdrawn, the command then cut off: nobody finds them from the next start on."""
    patient = ROWS[2].patient_id
    theirs = [row.series_uid for row in ROWS[:-1] if row.patient_id == patient]
    level.catalogue.withdraw(patient, "operator", "wish")
    assert set(theirs) <= set(indexed(level.index))
    assert catch_up(level.host, level.catalogue, level.index) == (0, len(theirs))
    assert is_level(level)
    level.catalogue.forget(theirs, [])
    assert level.catalogue.changes() == []
    assert catch_up(level.host, level.catalogue, level.index) == (0, 0)


def test_many_at_once_become_one_segment(level, store):
    def numbered(number: int) -> Series:
        return dataclasses.replace(ROWS[0], series_uid=f"2.25.99{number:04}")

    for number in range(520):
        store.catalogue.add_series(numbered(number))
    before = level.index.segments
    assert catch_up(level.host, level.catalogue, level.index) == (520, 0)
    assert level.index.segments == before + 1
    assert level.index.rows == level.catalogue.count()
