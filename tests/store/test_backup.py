"""A backup is whole or not there, comes back on either database, and brings nobody back."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import gzip
import json
import math
import os
import shutil
import sqlite3
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
import typer
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kakehashi.audit import Audit
from kakehashi.cli import upkeep
from kakehashi.config import Config
from kakehashi.errors import StoreError
from kakehashi.store import portable
from kakehashi.store.backup import backup, scrub, verify
from kakehashi.store.catalogue import TOMBSTONE, Catalogue, Cohort
from kakehashi.store.fsck import fsck
from kakehashi.store.restore import restore
from kakehashi.store.view import build_view

from .conftest import DATA, StoreUnderTest, settings
from .kill import killed
from .test_catalogue import KEPT, ROW

MORE = [
    dataclasses.replace(ROW, series_uid="1.2.4", patient_id="患者-2", study_uid="1.3"),
    dataclasses.replace(
        ROW, series_uid="1.2.5", patient_id="P'3\n", study_uid="1.4", study_date=None, flags=()
    ),
]


def later_tables(metadata: sa.MetaData) -> list[sa.Table]:
    """Tables that somebody adds in time to come, with every type that is allowed."""
    notes = sa.Table(
        "notes",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("series_uid", sa.String(64), index=True),
        sa.Column("said", sa.Text, unique=True),
        sa.Column("at", sa.DateTime),
        sa.Column("on", sa.Date),
        sa.Column("picture", sa.LargeBinary),
        sa.Column("weight", sa.Double),
        sa.Column("price", sa.Numeric(12, 4)),
        sa.Column("many", sa.BigInteger),
        sa.Column("few", sa.SmallInteger),
        sa.Column("true", sa.Boolean),
        sa.Column("facts", sa.JSON),
        sa.Column("order", sa.JSON, nullable=False),
    )
    replies = sa.Table(
        "replies",
        metadata,
        sa.Column("note", sa.ForeignKey("notes.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("said", sa.Text, nullable=False),
    )
    return [notes, replies]


NOTES = [
    {
        "id": 7,
        "series_uid": "1.2.3",
        "said": '肺 \\ "x" \n\t\'',
        "at": dt.datetime.fromisoformat("2026-01-02T03:04:05.678901"),
        "on": dt.date(1, 1, 1),
        "picture": bytes(range(256)),
        "weight": 0.1 + 0.2,
        "price": decimal.Decimal("12345678.9012"),
        "many": 2**62,
        "few": -3,
        "true": True,
        "facts": {"a": [1, None, "二"]},
        "order": [],
    },
    {"id": 9, "series_uid": "1.2.4", "said": "", "weight": math.inf, "order": None},
    {"id": 8, "series_uid": None, "said": None, "weight": -1.5, "true": False, "order": 0},
]
REPLIES = [
    {"note": 7, "number": 1, "said": "a"},
    {"note": 7, "number": 2, "said": "b"},
    {"note": 9, "number": 1, "said": "c"},
]


def fill(config: Config) -> Catalogue:
    catalogue = Catalogue.open(config.need_store())
    for row in (ROW, *MORE):
        catalogue.add_series(row)
    catalogue.add_kept(KEPT)
    catalogue.add_cohort(
        Cohort(
            project="ct", version=1, sha256="c" * 64, series=("1.2.3", "1.2.4"), frozen_at="2026"
        )
    )
    metadata = sa.MetaData()
    notes, replies = later_tables(metadata)
    metadata.create_all(catalogue.engine)
    with catalogue.engine.begin() as connection:
        for note in NOTES:
            connection.execute(sa.insert(notes), [note])
        connection.execute(sa.insert(replies), REPLIES)
    return catalogue


def content(catalogue: Catalogue) -> dict[str, list[str]]:
    """Every value of every table, as this database's driver gives it."""
    metadata = sa.MetaData()
    later = {table.name: table for table in later_tables(metadata)}
    with catalogue.engine.connect() as connection:
        found = portable.reflect(connection)
        known = {name: later.get(name, table) for name, table in found.tables.items()}
        return {
            name: sorted(
                repr(
                    sorted((column.name, value) for column, value in zip(table.c, row, strict=True))
                )
                for row in connection.execute(sa.select(table))
            )
            for name, table in known.items()
        }


def authority(root: Path) -> None:
    """Something like what the authority keeps."""
    folder = root / "authority"
    (folder / "keys").mkdir(parents=True)
    (folder / "keys/user-ca").write_text("secret")
    (folder / "keys/user-ca").chmod(0o600)
    Audit(folder / "audit.jsonl").append("store.initialised")
    with closing(sqlite3.connect(folder / "book.sqlite")) as book:
        book.execute("PRAGMA journal_mode = WAL")
        book.execute("CREATE TABLE sessions (id TEXT)")
        book.execute("INSERT INTO sessions VALUES ('s')")
        book.commit()
    (root / "secrets").mkdir(mode=0o700)
    (root / "secrets/deidentification").write_bytes(bytes(range(32)))
    (root / "projects/register").mkdir(parents=True)
    (root / "projects/register/p.json").write_text("{}")


def other(tmp_path: Path, **store: object) -> Config:
    root = tmp_path / "other"
    root.mkdir()
    return Config.model_validate(settings(root, **store))


@pytest.fixture
def record(tmp_path):
    """A small store on SQLite."""
    root = tmp_path / "root"
    root.mkdir()
    config = Config.model_validate(settings(root))
    catalogue = fill(config)
    authority(root)
    yield StoreUnderTest(config, catalogue, root)
    catalogue.close()


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("into", ["sqlite", "postgresql"])
def test_a_backup_comes_back_on_either_database(database, into, tmp_path, postgresql):
    catalogue = fill(database)
    before = content(catalogue)
    rows = catalogue.list_series()
    root = database.need_store().root
    authority(root)
    told = {}
    made = backup(database, catalogue, tmp_path / "backup", told.__setitem__)
    assert told == made.rows
    assert made.rows["series"] == 3
    assert made.rows["notes"] == 3
    catalogue.close()
    if into == "postgresql":
        engine = sa.create_engine(postgresql)
        with engine.begin() as connection:
            connection.execute(sa.text("DROP SCHEMA public CASCADE"))
            connection.execute(sa.text("CREATE SCHEMA public"))
        engine.dispose()
    target = other(tmp_path, **({"database": postgresql} if into == "postgresql" else {}))
    told.clear()
    counts = restored(target, tmp_path / "backup", progress=told.__setitem__)
    assert counts == told == made.rows
    back = Catalogue.open(target.need_store())
    assert back.list_series() == rows
    assert back.list_kept() == [KEPT]
    assert back.cohort("ct").series == ("1.2.3", "1.2.4")
    assert content(back) == before
    # What was made by description takes new rows, and refuses what the old one refused.
    with back.engine.connect() as connection:
        notes = portable.reflect(connection).tables["notes"]
        connection.execute(sa.insert(notes), [{"said": "new", "order": 1}])
        assert connection.scalar(sa.select(sa.func.max(notes.c.id))) == 10
        with pytest.raises(sa.exc.IntegrityError):
            connection.execute(sa.insert(notes), [{"said": "new", "order": 1}])
    back.close()
    there = target.need_store().root
    assert (there / "authority/keys/user-ca").read_text() == "secret"
    assert stat.S_IMODE((there / "authority/keys/user-ca").stat().st_mode) == 0o600
    assert (
        Audit(there / "authority/audit.jsonl").head()
        == Audit(root / "authority/audit.jsonl").head()
    )
    with closing(sqlite3.connect(there / "authority/book.sqlite")) as book:
        assert book.execute("SELECT * FROM sessions").fetchall() == [("s",)]
    assert (there / "secrets/deidentification").read_bytes() == bytes(range(32))
    assert (there / "projects/register/p.json").exists()
    assert list(there.glob(".restore*")) == []


def test_a_backup_is_for_its_owner_only_and_tells_what_is_in_it(record, tmp_path):
    umask = os.umask(0)
    try:
        made = backup(record.config, record.catalogue, tmp_path / "backup")
    finally:
        os.umask(umask)
    target = tmp_path / "backup"
    assert verify(target) == made
    for path in (target, *target.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert sorted(path.name.split("-")[0] for path in target.iterdir()) == [
        "authority", "manifest.json", "projects", "secrets", "tables",
    ]  # fmt: skip
    # A person can read it without this software.
    (path,) = target.glob("tables/series-*")
    first = json.loads(gzip.decompress(path.read_bytes()).splitlines()[0])
    assert first[:3] == ["1.2.3", "1.2", "患者-1"]
    assert list(tmp_path.glob("*.part")) == []


def test_uncommitted_writing_beside_it_is_not_in_it_and_does_not_stop_it(record, tmp_path):
    with closing(sqlite3.connect(record.root / "authority/book.sqlite")) as book:
        book.execute("INSERT INTO sessions VALUES ('half')")
        backup(record.config, record.catalogue, tmp_path / "backup")
        book.rollback()
    restore(other(tmp_path), tmp_path / "backup")
    with closing(sqlite3.connect(tmp_path / "other/authority/book.sqlite")) as book:
        assert book.execute("SELECT * FROM sessions").fetchall() == [("s",)]


def test_places_that_are_not_for_backups_are_refused(record, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "other.part").mkdir()
    (tmp_path / "other.part/precious").touch()
    (tmp_path / "link").symlink_to(record.root)
    for target, why in {
        tmp_path / "there": "is there already",
        tmp_path / "no/where": "mount it",
        record.root / "backup": "lies in the store",
        tmp_path / "link/backup": "lies in the store",
        tmp_path / "other": "move it away",
    }.items():
        with pytest.raises(StoreError, match=why):
            backup(record.config, record.catalogue, target)
    assert (tmp_path / "other.part/precious").exists()
    assert not (record.root / "backup").exists()


@pytest.mark.parametrize("which", ["manifest.json", "tables/series-*", "authority-*"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_backup_is_refused_before_anything_is_touched(record, tmp_path, which, damage):
    backup(record.config, record.catalogue, tmp_path / "backup")
    verify(tmp_path / "backup")
    (path,) = (tmp_path / "backup").glob(which)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    match damage:
        case "flipped":
            path.write_bytes(raw)
        case "cut":
            os.truncate(path, path.stat().st_size // 2)
        case "gone":
            path.unlink()
    target = other(tmp_path)
    for work in (
        lambda: verify(tmp_path / "backup"),
        lambda: restore(target, tmp_path / "backup"),
        lambda: scrub(tmp_path / "backup", {"患者-1"}),
    ):
        with pytest.raises(StoreError, match=r"use another backup|is not a backup"):
            work()
    assert list((tmp_path / "other").iterdir()) == []


def test_a_backup_of_a_later_format_is_refused(record, tmp_path, monkeypatch):
    monkeypatch.setattr("kakehashi.store.backup._FORMAT", 2)
    backup(record.config, record.catalogue, tmp_path / "backup")
    monkeypatch.undo()
    with pytest.raises(StoreError, match="has format 2, this software reads 1"):
        verify(tmp_path / "backup")


def test_a_store_with_a_record_is_not_restored_into_unless_asked(record, tmp_path):
    backup(record.config, record.catalogue, tmp_path / "backup")
    before, kept = content(record.catalogue), files(record.root)
    with pytest.raises(StoreError, match="--replace"):
        restore(record.config, tmp_path / "backup")
    shutil.rmtree(record.root / "authority")
    shutil.rmtree(record.root / "secrets")
    shutil.rmtree(record.root / "projects")
    with pytest.raises(StoreError, match=r"the table .* has rows"):
        restore(record.config, tmp_path / "backup")
    assert content(record.catalogue) == before
    assert list(record.root.glob("*restore*")) == []
    assert not (record.root / "authority").exists()
    authority(record.root)
    record.catalogue.drop_kept([KEPT.sha256])
    (record.root / "authority/keys/user-ca").write_text("newer")
    restore(record.config, tmp_path / "backup", replace=True)
    assert content(record.catalogue) == before
    assert (record.root / "authority/keys/user-ca").read_text() == "secret"
    (aside,) = record.root.glob("authority.before-restore-*")
    assert (aside / "keys/user-ca").read_text() == "newer"
    assert files(record.root)["secrets/deidentification"] == kept["secrets/deidentification"]


def test_a_restore_that_fails_late_leaves_all_as_it_was(record, tmp_path, monkeypatch):
    backup(record.config, record.catalogue, tmp_path / "backup")
    record.catalogue.drop_kept([KEPT.sha256])
    (record.root / "authority/keys/user-ca").write_text("newer")
    before, kept = content(record.catalogue), files(record.root)

    def fail(connection):
        raise OSError(28, "No space left on device", "here")

    monkeypatch.setattr(sa.Connection, "commit", fail)
    with pytest.raises(StoreError, match=r"No space left.*nothing was restored"):
        restore(record.config, tmp_path / "backup", replace=True)
    monkeypatch.undo()
    assert content(record.catalogue) == before
    after = files(record.root)
    del after[".backup.lock"]
    assert after == {name: what for name, what in kept.items() if name != ".backup.lock"}


def test_a_running_store_is_not_restored_into(record, tmp_path):
    backup(record.config, record.catalogue, tmp_path / "backup")
    target = other(tmp_path)
    (tmp_path / "other/run").mkdir()
    pid = tmp_path / "other/run/serve.pid"
    pid.write_text(f"{os.getpid()}\n")
    with pytest.raises(StoreError, match="the store is running"):
        restore(target, tmp_path / "backup")
    gone = subprocess.Popen(["true"])
    gone.wait()
    pid.write_text(f"{gone.pid}\n")
    assert restored(target, tmp_path / "backup")["series"] == 3


def test_a_column_that_this_software_lacks_is_refused(record, tmp_path):
    with record.catalogue.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE series ADD COLUMN dose REAL"))
    backup(record.config, record.catalogue, tmp_path / "backup")
    with pytest.raises(StoreError, match=r"has no column dose.*newer software"):
        restore(other(tmp_path), tmp_path / "backup")


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_type_that_only_one_database_has_is_refused(database, tmp_path):
    catalogue = Catalogue.open(database.need_store())
    with catalogue.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE odd (id INTEGER PRIMARY KEY, words TSVECTOR)"))
    with pytest.raises(StoreError, match=r"odd\.words"):
        backup(database, catalogue, tmp_path / "backup")
    assert not list(tmp_path.glob("backup*"))
    catalogue.close()


def test_full_text_indexes_are_left_to_their_triggers(record, tmp_path):
    with record.catalogue.engine.begin() as connection:
        connection.execute(sa.text("CREATE VIRTUAL TABLE words USING fts5(said)"))
        connection.execute(sa.text("INSERT INTO words VALUES ('x')"))
    made = backup(record.config, record.catalogue, tmp_path / "backup")
    assert not [name for name in made.rows if name.startswith("words")]


# Those who withdrew


def restored(*arguments, **options) -> dict[str, int]:
    return restore(*arguments, **options).rows


def without_first(rows: dict[str, int]) -> dict[str, int]:
    """What remains of `fill` without the first patient."""
    series = {"series": 2, "series_changes": 2}
    return rows | series | {"kept": 0, "kept_references": 0, "notes": 2, "replies": 1}


def names_of(folder: Path) -> str:
    return "".join(
        gzip.decompress(path.read_bytes()).decode() for path in folder.glob("tables/*.gz")
    )


def test_scrub_takes_a_person_out_of_a_backup(record, tmp_path):
    target = tmp_path / "backup"
    made = backup(record.config, record.catalogue, target)
    assert "患者-1" in names_of(target)
    removed = scrub(target, {"患者-1"})
    after = verify(target)
    assert after.rows == without_first(made.rows)
    assert removed == sum(made.rows.values()) - sum(after.rows.values())
    assert "患者-1" not in names_of(target)
    assert "肺" not in names_of(target)
    assert '"1.2.4"' in names_of(target)
    assert scrub(target, {"患者-1"}) == 0
    assert len(list(target.glob("tables/*"))) == len(after.rows)
    restore(other(tmp_path), target)
    catalogue = Catalogue.open(other_store(tmp_path))
    assert catalogue.series("1.2.3") is None
    assert catalogue.cohort("ct").series == (TOMBSTONE, "1.2.4")
    catalogue.close()


def other_store(tmp_path: Path):
    return Config.model_validate(settings(tmp_path / "other")).need_store()


def test_scrub_spares_others_that_only_refer_to_the_person(record, tmp_path):
    row = dataclasses.replace(
        KEPT, sha256="d" * 64, study_uid="1.3", series_uid="1.2.8", path="kept/x",
        patient_id="患者-2",
        refers_to=("1.2.3", "1.2.4"),
    )  # fmt: skip
    record.catalogue.add_kept(row)
    target = tmp_path / "backup"
    made = backup(record.config, record.catalogue, target)
    scrub(target, {"患者-1"})
    assert verify(target).rows == without_first(made.rows) | {"kept": 1, "kept_references": 1}
    restore(other(tmp_path), target)
    catalogue = Catalogue.open(other_store(tmp_path))
    assert [kept.refers_to for kept in catalogue.list_kept()] == [("1.2.4",)]
    catalogue.close()


def test_scrub_of_somebody_unknown_changes_nothing(record, tmp_path):
    backup(record.config, record.catalogue, tmp_path / "backup")
    before = files(tmp_path / "backup")
    assert scrub(tmp_path / "backup", {"nobody"}) == 0
    assert scrub(tmp_path / "backup", set()) == 0
    assert files(tmp_path / "backup") == before


def test_a_restore_leaves_out_who_is_named(record, tmp_path):
    made = backup(record.config, record.catalogue, tmp_path / "backup")
    back = restore(other(tmp_path), tmp_path / "backup", without={"患者-1"})
    assert back.rows == without_first(made.rows)
    assert back.left_out == {"1.2.3", "1.2.9"}


def test_who_withdrew_since_does_not_come_back_by_a_restore(record, tmp_path):
    made = backup(record.config, record.catalogue, tmp_path / "backup")
    withdrawn = sa.Table(
        "withdrawn",
        sa.MetaData(),
        sa.Column("patient_id", sa.String(128), primary_key=True),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
    )
    withdrawn.metadata.create_all(record.catalogue.engine)
    said = {"by": "x", "reason": "x", "at": "2026"}
    with record.catalogue.engine.begin() as connection:
        connection.execute(sa.insert(withdrawn), [{"patient_id": "患者-1"} | said])
    counts = restored(record.config, tmp_path / "backup", replace=True)
    assert counts["series"] == without_first(made.rows)["series"]
    assert record.catalogue.series("1.2.3") is None
    with record.catalogue.engine.connect() as connection:
        assert list(connection.scalars(sa.select(withdrawn.c.patient_id))) == ["患者-1"]
    # And a backup that knows of it says so to the next store.
    with record.catalogue.engine.begin() as connection:
        connection.execute(sa.insert(withdrawn), [{"patient_id": "患者-2"} | said])
    backup(record.config, record.catalogue, tmp_path / "second")
    assert scrub(tmp_path / "second", {"患者-1"}) == 0
    counts = restored(other(tmp_path), tmp_path / "second")
    assert (counts["withdrawn"], counts["series"]) == (2, 1)


# Cut off


def test_a_killed_backup_is_not_there_or_whole_and_the_next_one_works(record, tmp_path):
    target = tmp_path / "backup"
    number, ends = 1, set()

    def work() -> None:
        # Its own: a connection of SQLite is not to be used in two processes.
        backup(record.config, Catalogue.open(record.config.need_store()), target)

    while killed(target, number, work):
        ends.add(target.exists())
        if target.exists():
            verify(target)
            shutil.rmtree(target)
        number += 1
    assert number > 10
    assert False in ends
    verify(target)
    assert list(tmp_path.glob("*.part")) == []


def test_a_killed_scrub_leaves_a_whole_backup_and_is_repeated(record, tmp_path):
    whole = tmp_path / "whole"
    made = backup(record.config, record.catalogue, whole)
    target = tmp_path / "backup"
    number, seen = 1, set()
    while True:
        shutil.copytree(whole, target)
        if not killed(target, number, lambda: scrub(target, {"患者-1"})):
            break
        rows = verify(target).rows
        assert rows in (made.rows, without_first(made.rows))
        seen.add(rows["series"])
        scrub(target, {"患者-1"})
        assert verify(target).rows == without_first(made.rows)
        assert "患者-1" not in names_of(target)
        shutil.rmtree(target)
        number += 1
    assert seen == {2, 3}


# Only a real full disk says ENOSPC; CI is root and runs this.
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_full_disk_leaves_nothing(record, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False
    ).returncode:
        # A container may forbid it, also to root.
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(StoreError, match=r"(disk is full|No space left on device); nothing"):
            backup(record.config, record.catalogue, disk / "backup")
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        backup(record.config, record.catalogue, disk / "backup")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_after_a_restore_the_store_works_and_fsck_says_what_is_missing(store, tmp_path):
    store.add(DATA / "mr_adc", DATA / "ct_tilted")
    built = build_view(store.config, "everything", store.catalogue)
    backup(store.config, store.catalogue, tmp_path / "backup")
    target = other(tmp_path)
    restore(target, tmp_path / "backup")
    catalogue = Catalogue.open(target.need_store())
    with pytest.raises(StoreError, match="mount it"):
        fsck(target, catalogue)
    for name in ("packs", "kept"):
        shutil.copytree(store.root / name, tmp_path / "other" / name)
    row = catalogue.list_series()[0]
    (tmp_path / "other" / row.path).unlink()
    (finding,) = fsck(target, catalogue).findings
    assert (finding.kind, finding.path) == ("pack-missing", row.path)
    shutil.copy(store.root / row.path, tmp_path / "other" / row.path)
    again = build_view(target, "everything", catalogue)
    assert (again.manifest_sha256, again.cohort) == (built.manifest_sha256, built.cohort)
    catalogue.close()


def test_the_commands_say_what_they_did(record, tmp_path):
    app = typer.Typer()
    app.command("backup")(upkeep.backup)
    app.command("restore")(upkeep.restore)

    def run(root: Path, *arguments: str, status: int = 0) -> str:
        config = tmp_path / "kakehashi.toml"
        config.write_text(f'[store]\nroot = "{root}"\naddress = "store.example"\n')
        done = CliRunner().invoke(app, [*arguments, "--config", str(config)])
        assert done.exit_code == status, done.output
        return done.output if status == 0 else str(done.exception)

    target = str(tmp_path / "backup")
    assert "           3 series" in run(record.root, "backup", target)
    assert "is there already" in run(record.root, "backup", target, status=1)
    said = json.loads(run(record.root, "backup", target + "2", "--json"))
    assert said["rows"]["series"] == 3
    assert "--replace" in run(record.root, "restore", target, status=1)
    gone = tmp_path / "gone"
    gone.write_text("患者-1\n\n")
    other(tmp_path)
    said = run(tmp_path / "other", "restore", target, "--without", str(gone))
    assert "           2 series" in said
    assert "restored; 2 series left out: withdrawn" in said
    missing = run(record.root, "restore", target, "--without", str(tmp_path / "no"), status=1)
    assert "expected one id a line" in missing


VALUES = st.fixed_dictionaries(
    {
        "said": st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
        "weight": st.none() | st.floats(),
        "many": st.none() | st.integers(-(2**63), 2**63 - 1),
        "picture": st.none() | st.binary(),
        "on": st.none() | st.dates(),
        "at": st.none() | st.datetimes(),
        "true": st.none() | st.booleans(),
        "order": st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
            lambda one: st.lists(one) | st.dictionaries(st.text(st.characters(codec="utf-8")), one),
            max_leaves=5,
        ),
    }
)


@given(st.lists(VALUES, max_size=5, unique_by=lambda one: one["said"]))
@hypothesis_settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)
def test_any_values_come_back_as_they_were(rows):
    def made():
        metadata = sa.MetaData()
        engine = sa.create_engine("sqlite://")
        table = later_tables(metadata)[0]
        metadata.create_all(engine)
        return engine, table

    (one, table), (two, _) = made(), made()
    with one.begin() as connection, two.begin() as other_connection:
        for row in rows:
            connection.execute(sa.insert(table), [row])
        found = portable.reflect(connection).tables["notes"]
        written = [json.loads(line) for line in portable.lines(found, connection)]
        target = portable.reflect(other_connection).tables["notes"]
        portable.insert(portable.describe(found), written, target, other_connection)
        ways = [list(each.execute(sa.select(table))) for each in (connection, other_connection)]
    assert repr(ways[0]) == repr(ways[1])
    assert len(ways[0]) == len(rows)
    one.dispose()
    two.dispose()
