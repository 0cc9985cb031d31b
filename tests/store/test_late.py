"""Slices that come after their series was packed end up in the pack, as if they had come before."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from kakehashi.config import Config
from kakehashi.errors import StoreError
from kakehashi.store.catalogue import Catalogue, Cohort, Series
from kakehashi.store.indexing import catch_up, enter, opened
from kakehashi.store.ingest import INCOMPLETE, Origin, add
from kakehashi.store.layout import blocks_path, damaged_blocks
from kakehashi.store.query import TRUE
from kakehashi.store.view import build_view

from .conftest import UNSAID, StoreUnderTest, edit, settings
from .kill import killed
from .made import Slice, stack, write

Images = Callable[..., list[Path]]


@pytest.fixture
def images(tmp_path) -> Images:
    """Make a CT; each test gets the same."""

    def make(count: int = 8, **attributes: object) -> list[Path]:
        slices = [Slice(k=one.k, attributes=attributes) for one in stack(count)]
        return write(tmp_path / "in", slices, "CT")

    return make


@pytest.fixture
def at_once(tmp_path) -> Callable[..., tuple[Series, bytes]]:
    """Give the row and the pack of files that came all together, into another store."""

    def get(*files: Path, origin: Origin = UNSAID) -> tuple[Series, bytes]:
        root = tmp_path / "other"
        root.mkdir()
        store = Config.model_validate(settings(root)).need_store()
        catalogue = Catalogue.open(store)
        add(store, catalogue, files, origin=origin)
        (row,) = catalogue.list_series()
        catalogue.close()
        return row, (root / row.path).read_bytes()

    return get


def undated(row: Series) -> Series:
    return dataclasses.replace(row, added_at="")


def check_same(store: StoreUnderTest, expected: tuple[Series, bytes]) -> None:
    (row,) = store.catalogue.list_series()
    assert undated(row) == undated(expected[0])
    assert (store.root / row.path).read_bytes() == expected[1]
    assert damaged_blocks(store.root / row.path, row.blocks) == []
    assert store.files("*.part") == []


@pytest.mark.parametrize("first", [slice(0, 4), slice(4, 8), slice(0, 7), slice(0, 8, 2)])
def test_late_slices_give_what_all_at_once_give(store, images, at_once, first):
    files = images()
    early = files[first]
    store.add(*early)
    report = store.add(*(path for path in files if path not in early))
    assert ([row.slices for row in report.packed], report.kept, report.unchanged) == ([8], [], [])
    check_same(store, at_once(*files))


def test_one_after_the_other_gives_it_too(store, images, at_once):
    files = images(5)
    for path in files:
        store.add(path)
    check_same(store, at_once(*files))
    assert store.catalogue.list_kept() == []


def test_what_leaves_a_gap_waits_beside_the_pack_until_it_is_filled(store, images, at_once):
    files = images()
    store.add(*files[:4])
    before = store.files("packs/*/*")
    (kept,) = store.add(files[6]).kept
    assert kept.reason.startswith("the series is in the store without it: gap: ")
    assert [row.slices for row in store.catalogue.list_series()] == [4]
    assert store.files("packs/*/*") == before
    store.add(*files[4:6])
    assert [row.slices for row in store.catalogue.list_series()] == [7]
    assert store.catalogue.list_kept() == []
    assert store.files("*.dcm") == []
    store.add(files[7])
    check_same(store, at_once(*files))


def test_other_content_under_a_known_uid_stays_refused(store, images, at_once):
    files = images()
    expected = at_once(*files)
    store.add(*files[:4])
    edit(files[1], lambda ds: setattr(ds, "StationName", "OTHER"))
    (kept,) = store.add(*files).kept
    assert "other content under the same UID is refused" in kept.reason
    check_same(store, expected)


def test_images_of_another_person_or_hospital_do_not_get_into_a_pack(store, images):
    files = images()
    store.add(*files[:4])
    (row,) = store.catalogue.list_series()
    (kept,) = store.add(files[4], origin=Origin("F02")).kept
    assert "another hospital" in kept.reason
    edit(files[5], lambda ds: setattr(ds, "PatientID", "P2"))
    (kept,) = store.add(files[5]).kept
    assert "PatientID differs" in kept.reason
    assert store.catalogue.list_series() == [row]
    assert len(store.catalogue.list_kept()) == 2
    # Nor do they keep those out that belong there.
    store.add(files[4])
    assert [row.slices for row in store.catalogue.list_series()] == [5]
    assert [kept.reason for kept in store.catalogue.list_kept()] == [kept.reason]


@pytest.mark.parametrize("tiers", [(1, 2), (2, 1)])
def test_a_series_may_show_as_much_as_any_image_of_it(store, images, tiers):
    files = images()
    store.add(*files[:4], origin=Origin("F01", tiers[0]))
    (row,) = store.add(*files[4:], origin=Origin("F01", tiers[1])).packed
    assert row.tier == 2


def test_a_broken_late_image_holds_the_late_ones_back_until_it_comes_intact(store, images, at_once):
    files = images()
    store.add(*files[:4])
    whole = files[5].read_bytes()
    files[5].write_bytes(whole[:-40])
    assert len(store.add(*files[4:]).kept) == 4
    assert [row.slices for row in store.catalogue.list_series()] == [4]
    files[5].write_bytes(whole)
    store.add(files[5])
    check_same(store, at_once(*files))


def test_a_series_that_says_of_how_many_it_is_tells_while_some_are_missing(store, images, at_once):
    files = images(NumberOfSeriesRelatedInstances=8)
    report = store.add(*files[:4])
    assert [row.flags[-1] for row in report.packed] == [INCOMPLETE]
    assert list(report.short.values()) == ["4 of 8 objects"]
    report = store.add(*files[4:7])
    assert list(report.short.values()) == ["7 of 8 objects"]
    report = store.add(files[7])
    assert INCOMPLETE not in report.packed[0].flags
    assert report.short == {}
    check_same(store, at_once(*files))


def test_what_is_refused_says_how_many_have_come(store, images):
    files = images(NumberOfSeriesRelatedInstances=8)
    report = store.add(*files[:3], files[6])
    assert {kept.reason.rpartition("; ")[2] for kept in report.kept} == {"4 of 8 objects came"}


def test_a_damaged_pack_is_not_packed_anew(store, images):
    files = images()
    store.add(*files[:4])
    (row,) = store.catalogue.list_series()
    pack = store.root / row.path
    raw = bytearray(pack.read_bytes())
    raw[len(raw) // 2] ^= 1
    pack.write_bytes(raw)
    (kept,) = store.add(files[4]).kept
    assert "its pack is damaged" in kept.reason
    assert pack.read_bytes() == raw


def test_a_view_holds_the_pack_that_it_was_built_with_until_it_is_built_again(store, images):
    files = images()
    store.add(*files[:4])
    first = build_view(store.config, "ct", store.catalogue)
    (row,) = store.catalogue.list_series()
    link = store.root / "views/ct/series" / Path(row.path).name
    store.add(*files[4:])
    assert damaged_blocks(link, row.blocks) == []
    second = build_view(store.config, "ct", store.catalogue)
    assert (first.cohort.version, second.cohort.version) == (1, 2)
    (row,) = store.catalogue.list_series()
    assert damaged_blocks(link, row.blocks) == []


@pytest.mark.parametrize("built", [True, False])
def test_a_view_never_links_another_pack_than_its_manifest_names(store, images, monkeypatch, built):
    files = images()
    store.add(*files[:4])
    (row,) = store.catalogue.list_series()
    link = store.root / "views/ct/series" / Path(row.path).name
    if built:
        build_view(store.config, "ct", store.catalogue)
        store.add(files[4])
    (before,) = store.catalogue.list_series()
    freeze = store.catalogue.add_cohort

    def meanwhile(cohort: Cohort) -> None:
        store.add(*files[5:] if built else files[4:])
        freeze(cohort)

    monkeypatch.setattr(store.catalogue, "add_cohort", meanwhile)
    with pytest.raises(StoreError, match="packed anew while the view was built"):
        build_view(store.config, "ct", store.catalogue)
    monkeypatch.undo()
    assert store.catalogue.list_series() != [before]
    assert link.exists() == built
    assert not built or damaged_blocks(link, row.blocks) == []
    build_view(store.config, "ct", store.catalogue)
    assert damaged_blocks(link, store.catalogue.list_series()[0].blocks) == []


@pytest.mark.parametrize("entered", [True, False])
def test_the_index_has_the_new_row_and_not_the_old_one(store, images, entered):
    host = store.config.need_store()
    index = opened(host)
    files = images()
    enter(host, store.catalogue, index, store.add(*files[:4]).packed)
    catch_up(host, store.catalogue, index)
    report = store.add(*files[4:])
    if entered:
        enter(host, store.catalogue, index, report.packed)
    else:  # the process was killed before it could
        catch_up(host, store.catalogue, index)
    uid = report.packed[0].series_uid
    assert index.lookup(uid, permission=TRUE, columns=("slices",)) == {"slices": 8}
    assert index.rows == 1


def test_killed_anywhere_the_next_run_mends_it(store, images, at_once):
    files = images()
    expected = at_once(*files)

    def work() -> None:
        opened_anew = Catalogue.open(store.config.need_store())
        add(store.config.need_store(), opened_anew, files[4:])

    number, cuts, torn = 1, 0, 0
    while True:
        for path in store.root.glob("packs/*/*"):
            path.unlink()
        store.catalogue.forget([row.series_uid for row in store.catalogue.list_series()], [])
        store.add(*files[:4])
        if not killed(store.root, number, work):
            break
        (row,) = store.catalogue.list_series()
        pack = store.root / row.path
        torn += row.slices == 4 and other_hashes(pack, row)
        store.add(*files[4:])
        check_same(store, expected)
        number, cuts = number + 1, cuts + 1
    assert cuts >= 2
    assert torn >= 1


def other_hashes(pack: Path, row: Series) -> bool:
    return hashlib.sha256(blocks_path(pack).read_bytes()).hexdigest() != row.blocks


def test_a_run_that_was_cut_off_is_mended_by_any_file_of_the_series(store, images):
    """Between the new block hashes, the new pack, and its row."""
    files = images()
    store.add(*files[:4])
    (row,) = store.catalogue.list_series()
    pack = store.root / row.path
    old = {path: path.read_bytes() for path in (pack, blocks_path(pack))}
    store.add(*files[4:])
    (new,) = store.catalogue.list_series()
    # The new hashes are there, the old pack and row: all is old again.
    pack.write_bytes(old[pack])
    store.catalogue.replace_series(row)
    store.add(files[0])
    assert [undated(one) for one in store.catalogue.list_series()] == [undated(row)]
    assert damaged_blocks(pack, row.blocks) == []
    # The new pack is there too, without its row: it gets one.
    store.add(*files[4:])
    store.catalogue.replace_series(row)
    store.add(files[0])
    assert [undated(one) for one in store.catalogue.list_series()] == [undated(new)]
    assert damaged_blocks(pack, new.blocks) == []


def cut_off(store: StoreUnderTest, files: list[Path], origin: Origin) -> tuple[Series, Series]:
    """Leave the pack of eight slices with the row of four; return that row and the lost one."""
    store.add(*files[:4], origin=Origin("F01", 1))
    (old,) = store.catalogue.list_series()
    store.add(*files[4:], origin=origin)
    (new,) = store.catalogue.list_series()
    store.catalogue.replace_series(old)
    return old, new


@pytest.mark.parametrize("known", [True, False])
def test_another_hospital_does_not_take_over_what_was_cut_off(store, images, known):
    files = images(9)
    old, new = cut_off(store, files[:8], Origin("F01", 2))
    store.add(files[0 if known else 8], origin=Origin("F02", 3))
    (row,) = store.catalogue.list_series()
    assert row == old
    # Its own hospital mends it, with the tier of what the lost run had put in.
    store.add(*files[4:8], origin=Origin("F01", 2))
    (row,) = store.catalogue.list_series()
    assert undated(row) == undated(new)
    assert (row.facility, row.tier, row.slices) == ("F01", 2, 8)
    assert damaged_blocks(store.root / row.path, row.blocks) == []


def test_what_is_refused_raises_no_tier(store, images):
    files = images()
    _, new = cut_off(store, files, Origin("F01", 1))
    edit(files[1], lambda ds: setattr(ds, "StationName", "OTHER"))
    (kept,) = store.add(files[1], origin=Origin("F01", 3)).kept
    assert "other content under the same UID is refused" in kept.reason
    (row,) = store.catalogue.list_series()
    assert undated(row) == undated(new)
