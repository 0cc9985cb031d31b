"""``fsck`` finds whatever is wrong with a store, says nothing of a whole one, deletes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kakehashi.config import Config
from kakehashi.errors import StoreError
from kakehashi.store import fsckchecks
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.fsck import fsck
from kakehashi.store.layout import block_hashes, blocks_path
from kakehashi.store.pace import Pace
from kakehashi.store.view import build_view

from .conftest import DATA, StoreUnderTest, settings

PATIENCE_S = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with three series, kept objects and a view, made once."""
    root = tmp_path_factory.mktemp("made") / "store"
    root.mkdir()
    config = Config.model_validate(settings(root))
    catalogue = Catalogue.open(config.need_store())
    StoreUnderTest(config, catalogue, root).add(
        DATA / "mr_adc", DATA / "ct_tilted", DATA / "pet_uneven", DATA / "mr_small"
    )
    catalogue.close()
    return root


@pytest.fixture
def filled(made, tmp_path):
    root = tmp_path / "store"
    shutil.copytree(made, root)
    config = Config.model_validate(settings(root))
    catalogue = Catalogue.open(config.need_store())
    build_view(config, "everything", catalogue)
    yield StoreUnderTest(config, catalogue, root)
    catalogue.close()


def kinds(store: StoreUnderTest, **options) -> list[str]:
    return sorted(one.kind for one in fsck(store.config, store.catalogue, **options).findings)


def change(store: StoreUnderTest, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(store.root / "catalogue.sqlite")) as record:
        assert record.execute(statement, values).rowcount == 1
        record.commit()


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)  # in place: a view's link stays the same file


def rehash(store: StoreUnderTest, uid: str, pack: Path) -> None:
    """Make row and block hashes fit a pack that was changed."""
    blocks_path(pack).write_bytes(block_hashes(pack))
    digest = hashlib.sha256(blocks_path(pack).read_bytes()).hexdigest()
    change(
        store,
        "UPDATE series SET size = ?, blocks = ? WHERE series_uid = ?",
        pack.stat().st_size,
        digest,
        uid,
    )
    build_view(store.config, "everything", store.catalogue)


def everything(root: Path) -> dict[str, object]:
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and path.name != "catalogue.sqlite" else b""
        found[str(path)] = (status.st_ino, status.st_mode, status.st_mtime_ns, content)
    return {name: what for name, what in found.items() if ".fsck.lock" not in name}


def test_a_whole_store_has_no_finding(filled):
    report = fsck(filled.config, filled.catalogue)
    series = filled.catalogue.list_series()
    kept = filled.catalogue.list_kept()
    assert (report.findings, report.young) == ([], 0)
    assert len(series) == 3
    assert kept
    assert report.checked["series"] == len(series)
    assert report.checked["kept"] == len(kept)
    assert report.checked["views"] == 1
    assert report.read == sum(row.size for row in [*series, *kept])


def spoil_pack(name: str):
    def spoil(store: StoreUnderTest) -> None:
        row, other, *_ = store.catalogue.list_series()
        pack, hashes = store.root / row.path, blocks_path(store.root / row.path)
        set_row = "UPDATE series SET {} = ? WHERE series_uid = ?"
        match name:
            case "a flipped bit":
                flip(pack, pack.stat().st_size // 2)
            case "a flipped bit in the directory":
                flip(pack)
            case "cut":
                os.truncate(pack, pack.stat().st_size - 1)
            case "longer":
                with pack.open("ab") as file:
                    file.write(b"x")
            case "empty":
                os.truncate(pack, 0)
            case "gone":
                pack.unlink()
            case "hashes gone":
                hashes.unlink()
            case "hashes changed":
                flip(hashes)
            case "both gone":
                pack.unlink()
                hashes.unlink()
            case "a folder":
                pack.unlink()
                pack.mkdir()
            case "size of the row":
                change(store, set_row.format("size"), row.size + 1, row.series_uid)
            case "hash of the row":
                change(store, set_row.format("blocks"), "0" * 64, row.series_uid)
            case "slices of the row":
                change(store, set_row.format("slices"), row.slices + 1, row.series_uid)
            case "volumes of the row":
                change(store, set_row.format("volumes"), 2, row.series_uid)
            case "path of the row":
                change(store, set_row.format("path"), other.path, row.series_uid)
            case "path outside":
                change(store, set_row.format("path"), "../../etc/passwd", row.series_uid)
            case "no uid":
                change(store, set_row.format("series_uid"), "../1", row.series_uid)
            case "another series":
                shutil.copyfile(store.root / other.path, pack)
                rehash(store, row.series_uid, pack)
            case "directory was bad when hashed":
                flip(pack, pack.read_bytes().rindex(b"PK\1\2"))
                rehash(store, row.series_uid, pack)
            case "no zip":
                pack.write_bytes(b"no zip" * 100_000)
                rehash(store, row.series_uid, pack)

    return spoil


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a flipped bit", ["pack-damaged"]),
        ("a flipped bit in the directory", ["pack-damaged"]),
        ("cut", ["pack-damaged"]),
        ("longer", ["pack-damaged"]),
        ("empty", ["pack-damaged"]),
        ("gone", ["pack-missing"]),
        ("hashes gone", ["blocks"]),
        ("hashes changed", ["blocks"]),
        ("both gone", ["pack-missing"]),
        ("a folder", ["pack-unreadable", "stray", "view-link"]),
        ("size of the row", ["pack-damaged", "view-link"]),
        ("hash of the row", ["blocks", "view-link"]),
        ("slices of the row", ["pack-other"]),
        ("volumes of the row", ["pack-other"]),
        ("path of the row", ["orphan", "orphan", "row"]),
        ("path outside", ["orphan", "orphan", "row"]),
        ("no uid", ["row", "view-link"]),
        ("another series", ["pack-other"]),
        ("directory was bad when hashed", ["pack-other"]),
        ("no zip", ["pack-other"]),
    ],
)
def test_what_is_wrong_with_a_pack_or_its_row_is_found(filled, monkeypatch, name, expected):
    monkeypatch.setattr(fsckchecks, "YOUNG_S", -1)
    assert kinds(filled) == []
    spoil_pack(name)(filled)
    report = fsck(filled.config, filled.catalogue)
    assert sorted(one.kind for one in report.findings) == expected
    assert all(one.todo and one.what for one in report.findings)
    assert report.as_json()["ok"] is False


def test_a_missing_pack_that_a_view_still_has_is_pointed_out(filled):
    row = filled.catalogue.list_series()[0]
    (filled.root / row.path).unlink()
    (finding,) = fsck(filled.config, filled.catalogue).findings
    assert f"views/everything/series/{row.series_uid}.ozx" in finding.todo


@pytest.mark.parametrize(
    ("name", "expected"),
    [("flipped", "kept-damaged"), ("cut", "kept-damaged"), ("gone", "kept-missing"),
     ("outside", "row"), ("up", "row"), ("a folder", "kept-damaged")],
)  # fmt: skip
def test_what_is_wrong_with_a_kept_object_is_found(filled, name, expected):
    row = filled.catalogue.list_kept()[0]
    path = filled.root / row.path
    assert kinds(filled) == []
    where = "UPDATE kept SET path = ? WHERE sha256 = ?"
    match name:
        case "flipped":
            flip(path)
        case "cut":
            os.truncate(path, row.size - 1)
        case "gone":
            path.unlink()
        case "outside":
            change(filled, where, "/etc/passwd", row.sha256)
        case "up":
            change(filled, where, "kept/../catalogue.sqlite", row.sha256)
        case "a folder":
            path.unlink()
            path.mkdir()
    assert expected in kinds(filled)


def plant(path: Path, *, age: float = 2 * 86400) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("packs/aa/1.2.3.ozx", "orphan"),
        ("packs/aa/1.2.3.blocks", "orphan"),
        ("packs/aa/1.2.3.ozx.part", "part"),
        ("packs/aa/notes.txt", "stray"),
        ("packs/1.2.3.ozx", "orphan"),
        ("kept/aa/1.2.3.dcm", "orphan"),
        ("kept/aa/1.2.3.dcm.part", "part"),
    ],
)
def test_what_belongs_to_no_row_is_found_unless_it_is_young(filled, where, expected):
    path = plant(filled.root / where)
    (finding,) = fsck(filled.config, filled.catalogue).findings
    assert (finding.kind, finding.path) == (expected, where)
    os.utime(path)
    report = fsck(filled.config, filled.catalogue)
    if expected == "stray":
        assert len(report.findings) == 1
    else:
        assert (report.findings, report.young) == ([], expected == "orphan")


def spoil_view(store: StoreUnderTest, name: str) -> None:
    view = store.root / "views/everything"
    link = sorted((view / "series").glob("*.ozx"))[0]
    match name:
        case "link gone":
            link.unlink()
        case "hashes gone":
            blocks_path(link).unlink()
        case "a copy":
            content = link.read_bytes()
            link.unlink()
            link.write_bytes(content)
        case "another content":
            link.unlink()
            link.write_bytes(b"other")
        case "not in the manifest":
            (view / "series/1.2.3.ozx").write_bytes(b"x")
        case "no manifest":
            (view / "manifest.json").unlink()
        case "half a manifest":
            content = (view / "manifest.json").read_bytes()
            (view / "manifest.json").write_bytes(content[: len(content) // 2])
        case "another manifest":
            content = json.loads((view / "manifest.json").read_bytes())
            content["files"][0]["size"] += 1
            (view / "manifest.json").write_text(json.dumps(content))
        case "row gone":
            uid = link.name.removesuffix(".ozx")
            change(store, "DELETE FROM series WHERE series_uid = ?", uid)
        case "no project":
            view.rename(view.with_name("ended"))


VIEWS = [
    ("link gone", ["view-link"]),
    ("hashes gone", ["view-link"]),
    ("a copy", ["view-link"]),
    ("another content", ["view-link"]),
    ("not in the manifest", ["view-extra"]),
    ("no manifest", ["view-manifest"]),
    ("half a manifest", ["view-manifest"]),
    ("another manifest", ["view-link"]),
    ("row gone", ["view-link"]),
    ("no project", ["view-unowned"]),
]


@pytest.mark.parametrize(("name", "expected"), VIEWS)
def test_what_is_wrong_with_a_view_is_found(filled, name, expected):
    assert kinds(filled) == []
    spoil_view(filled, name)
    assert kinds(filled) == expected


def test_a_view_that_was_not_built_yet_is_not_wrong(filled):
    (filled.root / "views/ct/series").mkdir(parents=True)
    assert kinds(filled) == []


def test_nothing_is_changed_unless_asked(filled):
    for name in ("link gone", "not in the manifest"):
        spoil_view(filled, name)
    plant(filled.root / "packs/aa/1.2.3.ozx")
    plant(filled.root / "kept/aa/1.2.3.dcm.part")
    flip(filled.root / filled.catalogue.list_series()[-1].path)
    before = everything(filled.root)
    assert len(kinds(filled)) == 5
    assert everything(filled.root) == before


@pytest.mark.parametrize("name", ["link gone", "hashes gone", "a copy"])
def test_repair_relinks_what_is_whole(filled, name):
    spoil_view(filled, name)
    report = fsck(filled.config, filled.catalogue, repair=True)
    assert report.findings == []
    assert [one.kind for one in report.repaired] == ["view-link"]
    assert kinds(filled) == []


def test_repair_loses_nothing(filled):
    spoil_view(filled, "another content")
    plant(filled.root / "packs/aa/1.2.3.ozx")
    young = plant(filled.root / "packs/aa/1.2.4.ozx.part", age=0)
    old = plant(filled.root / "packs/aa/1.2.5.ozx.part")
    row = filled.catalogue.list_series()[-1]
    flip(filled.root / row.path)
    link = filled.root / f"views/everything/series/{row.series_uid}.ozx"
    link.unlink()
    report = fsck(filled.config, filled.catalogue, repair=True)
    assert sorted(one.kind for one in report.findings) == [
        "orphan", "pack-damaged", "view-link", "view-link",
    ]  # fmt: skip
    assert [one.kind for one in report.repaired] == ["part"]
    assert young.exists()
    assert not old.exists()
    assert not link.exists()


def test_what_is_withdrawn_meanwhile_is_not_wrong(filled):
    row = filled.catalogue.list_series()[0]

    class Withdraw:
        """Takes the row out after its missing pack was noticed."""

        done = False

        def at(self, stage, done, total, read):
            if stage == "kept" and not self.done:
                self.done = True
                change(filled, "DELETE FROM series WHERE series_uid = ?", row.series_uid)
                blocks_path(filled.root / row.path).unlink()
                build_view(filled.config, "everything", filled.catalogue)

    (filled.root / row.path).unlink()
    assert kinds(filled) == ["pack-missing"]
    assert kinds(filled, progress=Withdraw()) == []


def test_it_runs_beside_an_add(store):
    store.add(DATA / "mr_adc")
    done = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            catalogue = Catalogue.open(store.config.need_store())
            other = StoreUnderTest(store.config, catalogue, store.root)
            for name in ("ct_tilted", "pet_uneven", "mr_small", "sts"):
                other.add(DATA / name)
                build_view(store.config, "everything", catalogue)
            catalogue.close()
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    runs = 0
    while not done.is_set():
        assert kinds(store) == []
        runs += 1
    thread.join()
    assert errors == []
    assert runs > 1
    assert fsck(store.config, store.catalogue).checked["series"] > 3


PROJECT = """
[[projects]]
id = "everything"
title = "x"
purpose = "x"
approval = "1"
expires = 2099-01-01
groups = ["g"]
sites = ["s"]
"""
RUN = """
# Where the tests run with Ctrl-C ignored, a child would ignore it too.
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import sys
from pathlib import Path
import typer
from kakehashi.cli import upkeep
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(upkeep.fsck)
app()
"""


def start(store: StoreUnderTest, *arguments: str) -> subprocess.Popen[str]:
    config = store.root.parent / "kakehashi.toml"
    config.write_text(f'[store]\nroot = "{store.root}"\naddress = "store.example"\n{PROJECT}')
    return subprocess.Popen(
        [sys.executable, "-c", RUN, "--config", str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_progress(store: StoreUnderTest, process: subprocess.Popen[str]) -> dict:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(FileNotFoundError):
            state = json.loads((store.root / ".fsck.json").read_bytes())
            if state["wrong"]:
                return state
    raise AssertionError("it did not save how far it came")


def spoiled_first(store: StoreUnderTest) -> str:
    """Damage the first series; return its UID."""
    row = store.catalogue.list_series()[0]
    flip(store.root / row.path)
    return row.series_uid


def test_it_goes_on_after_a_kill(filled):
    uid = spoiled_first(filled)
    process = start(filled, "--rate", "0.3")
    state = wait_for_progress(filled, process)
    process.kill()
    process.wait()
    assert state["stage"] == "series"
    assert state["after"] >= uid
    report = fsck(filled.config, filled.catalogue)
    rows = filled.catalogue.list_series()
    again = [row for row in rows if row.series_uid > state["after"]]
    assert len(again) < len(rows)
    # What was wrong is known without reading the rest again, and is looked at twice.
    kept = sum(row.size for row in filled.catalogue.list_kept())
    assert report.read == sum(row.size for row in again) + kept + rows[0].size
    assert [one.kind for one in report.findings] == ["pack-damaged"]
    assert report.checked["series"] == len(rows)
    assert report.since == state["since"]
    assert not (filled.root / ".fsck.json").exists()


def test_ctrl_c_says_where_it_goes_on(filled):
    spoiled_first(filled)
    process = start(filled, "--rate", "0.3")
    wait_for_progress(filled, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, said
    assert "series looked at; the same command goes on from there" in said[1]
    assert "Traceback" not in said[1]
    second = start(filled, "--json")
    out, err = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 1, err
    report = json.loads(out)
    assert [one["kind"] for one in report["findings"]] == ["pack-damaged"]
    assert report["checked"]["series"] == len(filled.catalogue.list_series())


def test_the_command_exits_with_0_only_if_all_is_well(filled):
    process = start(filled)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert out.startswith("0 findings; ")
    plant(filled.root / "packs/aa/1.2.3.ozx")
    process = start(filled)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert out.startswith("orphan         packs/aa/1.2.3.ozx: ")


def test_from_start_forgets_what_was_found(filled):
    spoil_view(filled, "link gone")
    (filled.root / ".fsck.json").write_text("{")
    with pytest.raises(StoreError, match="--from-start"):
        fsck(filled.config, filled.catalogue)
    assert kinds(filled, resume=False) == ["view-link"]
    assert not (filled.root / ".fsck.json").exists()


def test_some_series_alone(filled):
    first, second, *_ = filled.catalogue.list_series()
    flip(filled.root / first.path)
    plant(filled.root / "packs/aa/1.2.3.ozx")
    assert kinds(filled, series=[second.series_uid]) == []
    assert kinds(filled, series=[second.series_uid, first.series_uid]) == ["pack-damaged"]
    with pytest.raises(StoreError, match=r"no series '1\.2\.3'"):
        fsck(filled.config, filled.catalogue, series=["1.2.3"])


def test_two_at_once_are_refused(filled):
    class Second:
        refused = False

        def at(self, stage, done, total, read):
            with pytest.raises(StoreError, match="another process holds"):
                fsck(filled.config, filled.catalogue)
            self.refused = True

    second = Second()
    fsck(filled.config, filled.catalogue, progress=second)
    assert second.refused


def test_a_storage_that_is_not_mounted_is_one_message(filled, monkeypatch):
    (filled.root / "packs").rename(filled.root / "elsewhere")
    with pytest.raises(StoreError, match="mount it"):
        fsck(filled.config, filled.catalogue)
    (filled.root / "packs").mkdir()
    monkeypatch.setattr("kakehashi.store.fsck.MOST_FINDINGS", 3)
    with pytest.raises(StoreError, match="3 things are wrong, which must have one cause"):
        fsck(filled.config, filled.catalogue)


def test_it_works_on_both_databases(database, made):
    root = database.need_store().root
    shutil.copytree(made / "packs", root / "packs")
    source = Catalogue.open(Config.model_validate(settings(made)).need_store())
    rows = source.list_series()
    source.close()
    catalogue = Catalogue.open(database.need_store())
    for row in rows:
        catalogue.add_series(row)
    store = StoreUnderTest(database, catalogue, root)
    build_view(database, "everything", catalogue)
    report = fsck(database, catalogue)
    assert (report.findings, report.checked["series"]) == ([], len(rows))
    flip(root / rows[1].path)
    assert kinds(store) == ["pack-damaged"]
    catalogue.close()


@given(st.lists(st.integers(1, 5_000_000), min_size=1, max_size=50), st.integers(1000, 1_000_000))
def test_reading_keeps_to_the_rate(counts, rate):
    class Clock:
        now = 0.0

        def sleep(self, seconds):
            assert seconds > 0
            self.now += seconds

    clock = Clock()
    pace = Pace(rate, lambda: clock.now, clock.sleep)
    for count in counts:
        pace.take(count)
        # One second's bytes may come at once.
        assert pace.taken <= rate * (clock.now + 1) * (1 + 1e-9)
    assert pace.taken == sum(counts)
    # And no slower than that either.
    assert clock.now <= sum(counts) / rate


def test_without_a_rate_nothing_waits():
    pace = Pace(None, sleep=lambda _: pytest.fail("it waited"))
    pace.take(10**15)
    assert pace.taken == 10**15
