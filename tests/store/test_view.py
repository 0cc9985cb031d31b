"""Views: a project sees its cohort and no more, and the manifest says exactly what."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import sqlalchemy as sa

from kakehashi.config import Config
from kakehashi.errors import StoreError
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.layout import blocks_path
from kakehashi.store.view import build_view, manifest_sha256, remove_view

from .conftest import DATA, settings
from .kill import killed


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


# What was checked before


@pytest.fixture
def read(monkeypatch):
    """Names of the block hashes that are read from now on."""
    names = []
    plain = Path.read_bytes

    def read_bytes(path):
        if path.suffix == ".blocks":
            names.append(path.name)
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    return names


def test_what_was_checked_and_is_the_same_is_not_read_again(filled, read):
    build_view(filled.config, "everything", filled.catalogue)
    assert len(read) == 5
    read.clear()
    build_view(filled.config, "everything", filled.catalogue)
    assert read == []
    (new,) = filled.add(DATA / "pet_uneven").packed
    read.clear()
    build_view(filled.config, "everything", filled.catalogue)
    assert read == [f"{new.series_uid}.blocks"]
    row = filled.catalogue.list_series()[0]
    os.utime(filled.root / row.path)
    read.clear()
    build_view(filled.config, "everything", filled.catalogue)
    assert read == [f"{row.series_uid}.blocks"]


@pytest.mark.parametrize(
    "damage", ["pack gone", "blocks gone", "pack cut", "blocks changed", "row"]
)
def test_what_was_checked_and_changed_since_is_found(filled, damage):
    build_view(filled.config, "everything", filled.catalogue)
    before = manifest_sha256(filled.root, "everything")
    row = filled.catalogue.list_series()[0]
    path = filled.root / row.path
    match damage:
        case "pack gone":
            path.unlink()
        case "blocks gone":
            blocks_path(path).unlink()
        case "pack cut":
            os.truncate(path, row.size - 1)
        case "blocks changed":
            # The same size, in place.
            blocks_path(path).write_bytes(bytes(blocks_path(path).stat().st_size))
        case "row":
            series = sa.table("series", sa.column("series_uid"), sa.column("blocks"))
            with filled.catalogue._engine.begin() as connection:
                same = series.c.series_uid == row.series_uid
                connection.execute(sa.update(series).where(same).values(blocks="0" * 64))
    with pytest.raises(StoreError, match="backup"):
        build_view(filled.config, "everything", filled.catalogue)
    assert manifest_sha256(filled.root, "everything") == before


def test_only_what_we_wrote_down_ourselves_is_believed(filled, read):
    build_view(filled.config, "everything", filled.catalogue)
    memory = filled.root / "views/.everything.checked"
    assert memory.stat().st_mode & 0o777 == 0o600
    written = memory.read_bytes()
    for spoil in (
        lambda: memory.chmod(0o666),
        lambda: memory.chmod(0o620),
        lambda: memory.write_bytes(written[:-1]),
        lambda: memory.write_bytes(b"[]"),
        lambda: memory.write_bytes(b'{"1.2.3": [1]}'),
        memory.unlink,
    ):
        memory.write_bytes(written)
        memory.chmod(0o600)
        read.clear()
        build_view(filled.config, "everything", filled.catalogue)
        assert read == []
        spoil()
        build_view(filled.config, "everything", filled.catalogue)
        assert len(read) == 5
        assert memory.stat().st_mode & 0o777 in (0o600, 0o666, 0o620)


# Taken away


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_view_is_taken_away_and_the_packs_stay(filled):
    first = build_view(filled.config, "everything", filled.catalogue)
    build_view(filled.config, "ct", filled.catalogue)
    packs = filled.files("packs/*/*")
    assert remove_view(filled.config, "everything") == 5
    assert everything(filled.root / "views") == [".ct.checked", "ct"]
    assert filled.files("packs/*/*") == packs
    assert len(manifest(filled, "ct")["files"]) == 2
    with pytest.raises(StoreError, match="no readable view"):
        manifest_sha256(filled.root, "everything")
    assert remove_view(filled.config, "everything") == 0
    again = build_view(filled.config, "everything", filled.catalogue)
    assert (again.manifest_sha256, again.linked) == (first.manifest_sha256, 5)


def test_a_view_of_a_project_that_left_the_configuration_is_taken_away(filled):
    build_view(filled.config, "ct", filled.catalogue)
    left = settings(filled.root)
    left["projects"] = left["projects"][1:]
    assert remove_view(Config.model_validate(left), "ct") == 2
    assert everything(filled.root / "views") == []


def test_taking_away_before_anything_was_built_is_nothing(filled):
    assert remove_view(filled.config, "ct") == 0


@pytest.mark.parametrize("name", ["..", "", ".", "ct/series", "../packs", ".ct.lock", "CT"])
def test_only_a_project_has_a_view_to_take_away(filled, name):
    build_view(filled.config, "ct", filled.catalogue)
    with pytest.raises(StoreError, match="not a project's id"):
        remove_view(filled.config, name)
    assert len(manifest(filled, "ct")["files"]) == 2


# Cut off


def check_served(store, project: str) -> str | None:
    """Whatever manifest is there names what is there; return its hash."""
    view = store.root / "views" / project
    if not (view / "manifest.json").exists():
        return None
    for entry in manifest(store, project)["files"]:
        row = store.catalogue.series(entry["series"]["series_uid"])
        for path in (view / entry["path"], blocks_path(view / entry["path"])):
            assert path.samefile((store.root / row.path).with_name(path.name))
    return manifest_sha256(store.root, project)


def test_a_build_that_is_killed_serves_what_was_or_what_will_be(filled):
    views = filled.root / "views"
    old = settings(filled.root)
    old["projects"][1]["cohort"] = {"modality": ["CT", "MR"]}
    new = settings(filled.root)
    new["projects"][1]["cohort"] = {"modality": ["CT", "PT"]}

    def build(which):
        catalogue = Catalogue.open(filled.config.need_store())
        return build_view(Config.model_validate(which), "everything", catalogue)

    hashes = [build(which).manifest_sha256 for which in (new, old)]
    remove_view(filled.config, "everything")
    seen, number = set(), 1
    while True:
        # Versions of the cohort stand in the manifest, so that only what it names is compared.
        before = build(old).manifest_sha256
        done = not killed(views, number, lambda: build(new))
        served = check_served(filled, "everything")
        seen.add(served == before)
        after = build(new)
        assert check_served(filled, "everything") == after.manifest_sha256
        assert {path.stem for path in (views / "everything/series").iterdir()} == set(
            after.cohort.series
        )
        number += 1
        if done:
            break
    assert len(set(hashes)) == 2
    assert seen == {True, False}
    assert number > 8


def test_taking_away_that_is_killed_leaves_all_or_nothing_in_reach(filled):
    views = filled.root / "views"
    seen, number = set(), 1
    while True:
        build_view(filled.config, "everything", filled.catalogue)
        done = not killed(views, number, lambda: remove_view(filled.config, "everything"))
        seen.add(check_served(filled, "everything") is None)
        if check_served(filled, "everything") is None:
            assert not (views / "everything").exists()
        if number % 2:
            remove_view(filled.config, "everything")
            assert everything(views) == []
        else:
            build_view(filled.config, "everything", filled.catalogue)
            assert everything(views) == [".everything.checked", "everything"]
        number += 1
        if done:
            break
    assert seen == {True, False}
    assert number > 10
