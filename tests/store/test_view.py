"""Views: a project sees its cohort and no more, and the manifest says exactly what."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from kakehashi.config import Config
from kakehashi.errors import StoreError
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.view import build_view, manifest_sha256

from .conftest import DATA, settings


@pytest.fixture
def filled(store):
    store.add(DATA / "mr_adc", DATA / "ct_tilted", DATA / "sts")
    return store


def manifest(store, project: str) -> dict:
    return json.loads((store.root / "views" / project / "manifest.json").read_bytes())


def test_a_view_holds_the_cohort_and_the_manifest_describes_it(filled):
    built = build_view(filled.config, "ct", filled.catalogue)
    view = filled.root / "views" / "ct"
    document = manifest(filled, "ct")
    rows = filled.catalogue.list_series(modality="CT")
    assert len(rows) == 2
    assert document["kakehashi_manifest"] == 1
    assert document["project"] == "ct"
    assert document["block_size"] == 131072
    assert document["cohort"] == {"version": 1, "sha256": built.cohort.sha256}
    assert [entry["path"] for entry in document["files"]] == [
        f"series/{row.series_uid}.ozx" for row in rows
    ]
    for entry, row in zip(document["files"], rows, strict=True):
        pack = view / entry["path"]
        blocks = pack.with_suffix(".blocks")
        assert pack.samefile(filled.root / row.path)
        assert pack.stat().st_size == entry["size"]
        assert hashlib.sha256(blocks.read_bytes()).hexdigest() == entry["blocks"]
        expected = row.as_json()
        del expected["path"]
        assert entry["series"] == expected
    assert sorted(p.name for p in view.rglob("*") if p.is_file()) == sorted(
        ["manifest.json"]
        + [f"{row.series_uid}{end}" for row in rows for end in (".ozx", ".blocks")]
    )
    raw = (view / "manifest.json").read_bytes()
    assert built.manifest_sha256 == manifest_sha256(filled.root, "ct")
    assert built.manifest_sha256 == hashlib.sha256(raw).hexdigest()


def test_an_empty_cohort_gives_an_empty_view(filled):
    build_view(filled.config, "none", filled.catalogue)
    assert manifest(filled, "none")["files"] == []
    assert list((filled.root / "views/none/series").iterdir()) == []


def test_building_again_changes_nothing(filled):
    first = build_view(filled.config, "everything", filled.catalogue)
    before = (filled.root / "views/everything/manifest.json").stat()
    again = build_view(filled.config, "everything", filled.catalogue)
    assert (again.cohort, again.manifest_sha256) == (first.cohort, first.manifest_sha256)
    assert (first.linked, again.linked, again.removed) == (5, 0, 0)
    assert (filled.root / "views/everything/manifest.json").stat().st_ino == before.st_ino


def test_a_new_series_gives_a_new_version_of_the_cohort(filled):
    first = build_view(filled.config, "everything", filled.catalogue)
    filled.add(DATA / "pet_uneven")
    again = build_view(filled.config, "everything", filled.catalogue)
    assert (again.linked, again.cohort.version) == (1, 2)
    assert again.cohort.sha256 != first.cohort.sha256
    assert again.manifest_sha256 != first.manifest_sha256
    assert filled.catalogue.cohort("everything") == again.cohort


def test_what_left_the_cohort_leaves_the_view_and_stays_in_the_store(filled):
    build_view(filled.config, "everything", filled.catalogue)
    narrowed = settings(filled.root)
    narrowed["projects"][1]["cohort"] = {"modality": ["MR"]}
    built = build_view(Config.model_validate(narrowed), "everything", filled.catalogue)
    assert (built.linked, built.removed) == (0, 3)
    assert len(manifest(filled, "everything")["files"]) == 2
    assert len(list((filled.root / "views/everything/series").iterdir())) == 4
    for row in filled.catalogue.list_series():
        assert (filled.root / row.path).exists()


def test_what_a_killed_run_left_is_tidied(filled):
    build_view(filled.config, "ct", filled.catalogue)
    view = filled.root / "views/ct"
    (row, *_) = filled.catalogue.list_series(modality="CT")
    target = view / "series" / f"{row.series_uid}.ozx"
    target.unlink()
    target.with_name(target.name + ".part").write_bytes(b"")
    (view / "series" / "1.2.3.ozx.part").write_bytes(b"")
    build_view(filled.config, "ct", filled.catalogue)
    assert target.samefile(filled.root / row.path)
    assert list(view.rglob("*.part")) == []


@pytest.mark.parametrize("damage", ["pack gone", "blocks gone", "pack cut", "blocks changed"])
def test_a_damaged_store_gives_no_new_view(filled, damage):
    build_view(filled.config, "everything", filled.catalogue)
    before = manifest_sha256(filled.root, "everything")
    filled.add(DATA / "pet_uneven")
    path = filled.root / filled.catalogue.list_series(modality="PT")[0].path
    blocks = path.with_suffix(".blocks")
    match damage:
        case "pack gone":
            path.unlink()
        case "blocks gone":
            blocks.unlink()
        case "pack cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "blocks changed":
            blocks.write_bytes(bytes(32))
    with pytest.raises(StoreError, match="backup"):
        build_view(filled.config, "everything", filled.catalogue)
    assert manifest_sha256(filled.root, "everything") == before


def test_an_unknown_project_is_refused(filled):
    with pytest.raises(StoreError, match=r"no project 'brain'.*there are: ct, everything, none"):
        build_view(filled.config, "brain", filled.catalogue)
    with pytest.raises(StoreError, match="kakehashi store view brain"):
        manifest_sha256(filled.root, "brain")


def test_a_view_opens_the_catalogue_itself(filled):
    assert build_view(filled.config, "ct").cohort.version == 1
    assert Catalogue.open(filled.config.need_store()).cohort("ct") is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a chroot")
def test_sshd_would_accept_the_view_as_a_chroot(filled):
    umask = os.umask(0o077)
    try:
        build_view(filled.config, "ct", filled.catalogue)
    finally:
        os.umask(umask)
    view = filled.root / "views/ct"
    for folder in (view.parent, view, view / "series"):
        stat = folder.stat()
        assert (stat.st_uid, stat.st_mode & 0o7777) == (0, 0o755)
    assert (view / "manifest.json").stat().st_mode & 0o7777 == 0o644
    for pack in (view / "series").iterdir():
        assert pack.stat().st_mode & 0o7777 == 0o640
