"""An index changes whole or not at all, forgets what is withdrawn, and says when it is damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from kakehashi.errors import StoreError
from kakehashi.store.facets import Index, build_library, library
from kakehashi.store.facets.batches import as_batch
from kakehashi.store.facets.build import build_segment
from kakehashi.store.facets.identifiers import Identifiers, hashes_of, joined, keys_of
from kakehashi.store.query import COLUMNS, FALSE, TRUE, parse

from .cases import POOLS, table

ROWS = table(3, 40)
UIDS = sorted(row.series_uid for row in ROWS)


@pytest.fixture
def index(tmp_path) -> Index:
    made = Index.create(tmp_path / "index")
    made.add_segment([ROWS[:25]])
    made.add_segment([ROWS[25:]])
    return made


def uids(index: Index) -> list[str]:
    return sorted(index.select(permission=TRUE))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_empty_index_answers(tmp_path):
    index = Index.create(tmp_path / "index")
    assert index.rows == index.segments == index.withdraw(["1.2"]) == index.compact() == 0
    assert index.page(permission=TRUE).rows == ()
    assert index.lookup("1.2", permission=TRUE) is None
    assert index.histogram("age", permission=TRUE).counts == ()
    assert index.add_segment([]) == 0
    assert index.facets(permission=TRUE).total == index.rows == 0
    assert index.add_segment([ROWS]) == 40
    assert uids(index) == UIDS
    with pytest.raises(StoreError, match="already"):
        Index.create(tmp_path / "index")


def test_what_is_withdrawn_is_gone_at_once_for_everybody(index, tmp_path):
    reader = Index.open(tmp_path / "index")
    gone = [UIDS[0], UIDS[7], "9.9.9", UIDS[0]]
    assert uids(reader) == UIDS
    assert index.withdraw(gone) == 2
    left = sorted(set(UIDS) - set(gone))
    for one in (index, reader, Index.open(tmp_path / "index")):
        assert uids(one) == left
        assert one.rows == one.facets(permission=TRUE).total == 38
        assert one.lookup(UIDS[0], permission=TRUE) is None
        assert {row["series_uid"] for row in one.page(permission=TRUE).rows} == set(left)
        assert one.count(parse(f"series_uid == '{UIDS[0]}'"), permission=TRUE) == 0
    assert index.withdraw(gone) == 0
    assert index.withdraw(UIDS) == 38
    assert uids(reader) == []


def test_a_series_that_comes_again_takes_the_place_of_the_old_one(index):
    changed = [dataclasses.replace(row, modality="MG") for row in ROWS[20:30]]
    index.add_segment([changed])
    assert index.rows == 40
    assert index.count(parse("modality == 'MG'"), permission=TRUE) == 10
    assert index.lookup(ROWS[22].series_uid, permission=TRUE)["modality"] == "MG"
    index.withdraw([ROWS[22].series_uid])
    assert index.lookup(ROWS[22].series_uid, permission=TRUE) is None
    index.add_segment([[ROWS[22]]])
    assert index.lookup(ROWS[22].series_uid, permission=TRUE)["modality"] == ROWS[22].modality


def test_compacting_changes_nothing_but_the_segments(index, tmp_path):
    index.withdraw(UIDS[:3])
    before = index.facets(permission=TRUE)
    rows = {row["series_uid"]: row for row in index.page(permission=TRUE).rows}
    assert index.compact(20) == sum(r.series_uid not in UIDS[:3] for r in ROWS[25:])
    assert index.segments == 2
    assert index.compact() == 37
    assert index.segments == 1
    assert index.facets(permission=TRUE) == before
    assert {row["series_uid"]: row for row in index.page(permission=TRUE).rows} == rows
    # Nothing of the withdrawn is left in the files either.
    stored = b"".join(p.read_bytes() for p in (tmp_path / "index").rglob("*") if p.is_file())
    assert b"alive-" not in stored
    generation = index.generation
    assert index.compact() == 37
    assert index.generation == generation


def test_values_of_withdrawn_series_are_not_in_the_files_after_compacting(tmp_path):
    index = Index.create(tmp_path / "index")
    secret = dataclasses.replace(ROWS[0], description="山田太郎", patient_id="P-4711")
    index.add_segment([[secret, *ROWS[1:]]])

    def stored() -> bytes:
        return b"".join(p.read_bytes() for p in (tmp_path / "index").rglob("*") if p.is_file())

    assert "山田太郎".encode() in stored()
    assert b"P-4711" in stored()
    index.withdraw([secret.series_uid])
    assert ("山田太郎" in str(index.facets(permission=TRUE))) is False
    index.compact()
    assert "山田太郎".encode() not in stored()
    assert b"P-4711" not in stored()


def test_series_are_withdrawn_while_segments_are_built(index, monkeypatch):
    """A person's wish does not wait for a long build, and is not lost in what it builds."""
    import kakehashi.store.facets.index as module

    build = module.build_segment

    def slow(folder, batches, **options):
        rows = build(folder, batches, **options)
        thread = threading.Thread(target=lambda: gone.append(other.withdraw(wanted)))
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        return rows

    gone: list[int] = []
    other = Index.open(index._folder)
    monkeypatch.setattr(module, "build_segment", slow)
    wanted = UIDS[:5]
    assert index.compact() == 35
    assert gone == [5]
    assert uids(index) == uids(other) == UIDS[5:]
    wanted = UIDS[5:7]
    index.add_segment([[dataclasses.replace(ROWS[0], series_uid="1.7")]])
    assert gone == [5, 2]
    assert uids(index) == sorted([*UIDS[7:], "1.7"])


def test_a_reader_sees_the_old_or_the_new(index, tmp_path):
    """While another thread adds, withdraws and compacts, no answer is of two generations."""
    moved = [row.series_uid for row in ROWS[:10]]
    reader = Index.open(tmp_path / "index")
    done = threading.Event()
    failures: list[object] = []

    def write() -> None:
        try:
            for _ in range(6):
                index.withdraw(moved)
                index.add_segment([ROWS[:10]])
                index.compact()
        except BaseException as error:  # shown below
            failures.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        while not done.is_set():
            found = uids(reader)
            facets = reader.facets(permission=TRUE, columns=["modality"])
            assert sum(count for _, count in facets.counts["modality"]) == facets.total
            seen.add(len(found))
            assert found in (UIDS, sorted(set(UIDS) - set(moved)))
    finally:
        writer.join()
    assert not failures
    assert seen <= {30, 40}
    assert uids(reader) == UIDS


def test_rows_that_are_not_as_expected_leave_the_index_as_it_was(index, tmp_path):
    before = files(tmp_path)
    batch = as_batch(ROWS[:5])
    broken: list[tuple[object, str]] = [
        ([ROWS[:2], ROWS[1:3]], "twice"),
        ([[ROWS[0], ROWS[0]]], "twice"),
        ([batch.select(["series_uid"])], "no column"),
        ([batch.set_column(7, "manufacturer", pa.array([b"\xff"] * 5))], "cannot be taken"),
        ([batch.set_column(0, "series_uid", pa.array([None] * 5, pa.string()))], "not known"),
    ]
    for batches, said in broken:
        with pytest.raises(StoreError, match=said):
            index.add_segment(batches)
    with pytest.raises(ZeroDivisionError):
        index.add_segment(iter(lambda: 1 // 0, None))
    assert files(tmp_path) == before
    assert uids(index) == UIDS


def test_what_an_interrupted_writer_left_is_taken_away(index, tmp_path):
    segments = tmp_path / "index" / "segments"
    shutil.copytree(segments / "000001", segments / "000009")
    shutil.copytree(segments / "000001", tmp_path / "index" / "building" / "segment.part")
    (segments / "000001.alive-000077").write_bytes(b"x")
    assert uids(index) == UIDS
    index.add_segment([[dataclasses.replace(ROWS[0], series_uid="1.7")]])
    assert {path.name for path in segments.iterdir()} == {"000001", "000002", "000003"}
    assert not (tmp_path / "index" / "building").exists()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def no_json(path: Path) -> None:
    path.write_bytes(b"{")


def other_version(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": 99}))


def without_columns(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"columns": {}}))


def arrays_elsewhere(path: Path) -> None:
    meta = json.loads(path.read_bytes())
    meta["arrays"]["tier.codes"]["begin"] = 2**40
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("index.json", Path.unlink, "No such file"),
        ("index.json", no_json, "cannot be read"),
        ("index.json", other_version, "version 99"),
        ("segments/000001/meta.json", Path.unlink, "is missing"),
        ("segments/000001/meta.json", no_json, "cannot be read"),
        ("segments/000001/meta.json", other_version, "version 99"),
        ("segments/000001/meta.json", without_columns, "not as expected"),
        ("segments/000001/meta.json", arrays_elsewhere, "not as expected"),
        ("segments/000001/data.bin", Path.unlink, "is missing"),
        ("segments/000001/data.bin", cut, "bytes, expected"),
        ("segments/000001.alive-000003", Path.unlink, "No such file"),
        ("segments/000001.alive-000003", cut, "damaged"),
        ("segments/000001.alive-000003", no_json, "damaged"),
    ],
)
def test_damage_is_said(
    index: Index, tmp_path: Path, name: str, damage: Callable[[Path], None], said: str
):
    index.withdraw([ROWS[0].series_uid])
    path = tmp_path / "index" / name
    assert path.is_file()
    damage(path)
    with pytest.raises(StoreError, match=said):
        Index.open(tmp_path / "index")


def test_a_flipped_bit_is_found_and_crashes_nothing(index, tmp_path):
    assert index.verify(index.names()) == []
    path = tmp_path / "index" / "segments" / "000001" / "data.bin"
    place = json.loads((path.parent / "meta.json").read_bytes())["arrays"]["vendor.codes"]
    data = bytearray(path.read_bytes())
    data[place["begin"]] ^= 0x80
    path.write_bytes(data)
    damaged = Index.open(tmp_path / "index")
    assert damaged.verify(damaged.names()) == [path.parent / "vendor.codes"]
    assert damaged.count(parse("vendor == 'GE'"), permission=TRUE) <= 40
    damaged.facets(permission=TRUE)
    damaged.combinations(("vendor", "model"), permission=TRUE)


def test_warming_changes_nothing(index, tmp_path):
    index.warm()
    Index.create(tmp_path / "empty").warm()
    assert uids(index) == UIDS


def test_opening_reads_no_rows(index, tmp_path):
    """What a start-up takes does not grow with the rows: no array is looked at."""
    path = tmp_path / "index" / "segments" / "000001" / "data.bin"
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    Index.open(tmp_path / "index")


def test_a_missing_or_foreign_library_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "places", lambda: (tmp_path / "libexec" / library.NAME,))
    with pytest.raises(StoreError, match=r"python -m kakehashi\.store\.facets\.build_library"):
        library.load()
    built = build_library.build(tmp_path / "libexec")
    assert library.load().facets_abi() == library.ABI
    assert {path.name for path in built.parent.iterdir()} == {library.NAME}
    monkeypatch.setattr(library, "places", lambda: (tmp_path / "other" / library.NAME,))
    build_library.build(tmp_path / "other")
    monkeypatch.setattr(library, "ABI", 99)
    with pytest.raises(StoreError, match="another release"):
        library.load()
    broken = tmp_path / library.NAME
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "places", lambda: (broken,))
    with pytest.raises(StoreError, match="cannot be loaded"):
        library.load()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreError, match="no C compiler"):
        build_library.build(tmp_path / "libexec")


def test_identifiers_come_back_as_they_were():
    texts = [
        *("2.25.0", "2.25.00", "2.25.1", f"2.25.{2**128 - 1}", f"2.25.{2**128}", "2.25.", "2.25"),
        *(
            "2.25.-1",
            "2.25. 1",
            "",
            "患者",
            "1.2.840.113619",
            "2.25.12345678901234567890",
            "a" * 90,
        ),
        f"2.25.{10**39}",
    ]
    keys, plain = keys_of(*joined(texts))
    assert [t for t, one in zip(texts, plain, strict=True) if one] == [
        "2.25.0",
        "2.25.1",
        f"2.25.{2**128 - 1}",
        "2.25.12345678901234567890",
    ]
    hashes = hashes_of(keys)
    order = hashes.argsort()
    others = (~plain).nonzero()[0]
    blob, offsets = joined([texts[at] for at in others])
    made = Identifiers(keys, others, blob, offsets, hashes=hashes[order], order=order)
    assert made.texts(order) == [texts[at] for at in order]
    assert made.find(texts).tolist() == list(range(len(texts)))
    assert made.find(["2.25.2", "x", "2.25.01"]).tolist() == [-1, -1, -1]


def test_identifiers_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    """Whatever the hash does, it only makes the search quicker."""
    import kakehashi.store.facets.build as build
    import kakehashi.store.facets.identifiers as identifiers

    for module in (build, identifiers):
        monkeypatch.setattr(module, "hashes_of", lambda keys: keys[:, 1] & 1)
    index = Index.create(tmp_path / "index")
    index.add_segment([ROWS[:25]])
    index.add_segment([ROWS[25:]])
    assert uids(index) == UIDS
    for row in ROWS:
        assert index.lookup(row.series_uid, permission=TRUE)["study_uid"] == row.study_uid
    for study in POOLS["study_uid"]:
        expected = sum(row.study_uid == study for row in ROWS)
        assert index.count(parse(f"study_uid == '{study}'"), permission=TRUE) == expected
    assert index.withdraw(UIDS[::2]) == 20
    assert uids(index) == UIDS[1::2]


def test_a_segment_is_built_whole_or_not_at_all(tmp_path):
    with pytest.raises(StoreError, match="twice"):
        build_segment(tmp_path / "one", [ROWS, ROWS])
    assert list(tmp_path.iterdir()) == []
    steps: list[tuple[str, int]] = []
    build_segment(tmp_path / "one", [ROWS], progress=lambda step, done: steps.append((step, done)))
    assert steps[0] == ("reading", 40)
    assert steps[-1] == ("writing", len(COLUMNS))
    assert files(tmp_path) == {"one/data.bin", "one/meta.json"}
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="no segment is built"):
        build_segment(tmp_path / "file" / "one", [ROWS])


def test_lookup_asks_for_permission(index):
    row = ROWS[0]
    assert index.lookup(row.series_uid, permission=FALSE) is None
    other = parse(f"facility != '{row.facility}'")
    assert index.lookup(row.series_uid, permission=other) is None
    found = index.lookup(row.series_uid, permission=~other, columns=["facility"])
    assert found == {"facility": row.facility}
