"""``fsck`` and series that were packed anew while a view still has the earlier pack."""

from __future__ import annotations

from pathlib import Path

import pytest

from kakehashi.store.fsck import fsck
from kakehashi.store.layout import blocks_path
from kakehashi.store.view import build_view

from .conftest import StoreUnderTest
from .made import stack, write
from .test_fsck import PATIENCE_S, everything, flip, start


@pytest.fixture
def anew(store, tmp_path) -> StoreUnderTest:
    """A store whose only series was packed anew since its view was built."""
    files = write(tmp_path / "in", stack(8), "CT")
    store.add(*files[:4])
    build_view(store.config, "everything", store.catalogue)
    store.add(*files[4:])
    return store


def link(store: StoreUnderTest) -> Path:
    (row,) = store.catalogue.list_series()
    path = store.root / f"views/everything/series/{row.series_uid}.ozx"
    assert not path.samefile(store.root / row.path)
    return path


def test_a_view_with_earlier_packs_is_out_of_date_and_not_damaged(anew):
    link(anew)
    before = everything(anew.root)
    report = fsck(anew.config, anew.catalogue)
    assert (report.findings, report.outdated) == ([], {"everything": 1})
    assert everything(anew.root) == before
    process = start(anew)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "1 series were packed anew" in out
    assert "kakehashi store view everything" in out
    build_view(anew.config, "everything", anew.catalogue)
    assert fsck(anew.config, anew.catalogue).outdated == {}


def test_how_far_a_view_is_out_of_date_is_kept_where_the_check_is_stopped(anew):
    class Stops:
        def at(self, stage: str, done: int, total: int | None, read: int) -> None:
            if stops and stage == "views":
                raise KeyboardInterrupt

    stops = True
    with pytest.raises(KeyboardInterrupt):
        fsck(anew.config, anew.catalogue, progress=Stops())
    stops = False
    assert fsck(anew.config, anew.catalogue, progress=Stops()).outdated == {"everything": 1}


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "other hashes", "gone", "hashes gone"])
@pytest.mark.parametrize("repair", [False, True])
def test_an_earlier_pack_that_is_damaged_is_found_and_never_replaced_by_the_new_one(
    anew, damage, repair
):
    path = link(anew)
    match damage:
        case "a flipped bit":
            flip(path, path.stat().st_size // 2)
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "other hashes":
            flip(blocks_path(path))
        case "gone":
            path.unlink()
        case "hashes gone":
            blocks_path(path).unlink()
    before = everything(anew.root / "views")
    report = fsck(anew.config, anew.catalogue, repair=repair)
    (found,) = report.findings
    assert found.kind == "view-link"
    assert "packed anew" in found.what
    assert "kakehashi store view everything" in found.todo
    assert "--repair" not in found.todo
    assert report.outdated == {}
    assert report.repaired == []
    assert everything(anew.root / "views") == before


def test_an_earlier_pack_in_a_view_is_no_copy_of_one_that_is_missing(anew):
    link(anew)
    (row,) = anew.catalogue.list_series()
    (anew.root / row.path).unlink()
    (found,) = fsck(anew.config, anew.catalogue).findings
    assert found.kind == "pack-missing"
    assert "link it back" not in found.todo
