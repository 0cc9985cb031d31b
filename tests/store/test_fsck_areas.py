"""``fsck`` looks at the receiver's folders, at staging, and at the index of facets, too."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from kakehashi.config import Config
from kakehashi.store import fsckareas
from kakehashi.store.catalogue import Catalogue
from kakehashi.store.facets import Index
from kakehashi.store.facets.files import Reader
from kakehashi.store.fsck import fsck
from kakehashi.store.fsckfinding import STALE_S, Finding
from kakehashi.store.indexing import catch_up, opened
from kakehashi.store.ingest import Origin
from kakehashi.store.intake.staging import Staging
from kakehashi.store.receive import Inbox

from .conftest import StoreUnderTest, files_of, settings
from .intake.conftest import send
from .test_fsck import everything, flip

SERIES = "1.2.392.1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with two series in its index, two received objects, one held, one staged."""
    root = tmp_path_factory.mktemp("areas") / "store"
    root.mkdir()
    config = Config.model_validate(settings(root))
    catalogue = Catalogue.open(config.need_store())
    StoreUnderTest(config, catalogue, root).add(*files_of("mr_adc"), *files_of("pet_uneven"))
    catch_up(config.need_store(), catalogue, opened(config.need_store()))
    catalogue.close()
    inbox = Inbox(root)
    files = files_of("mr_adc")[:3]
    for path in files:
        assert send(inbox, path) == "stored"
    inbox.quarantine(next(inbox.entries()), "a person must look at it")
    Staging(root).put(SERIES, "1.2.392.2", Origin("F01", 2), "p1", files[0].read_bytes())
    return root


@pytest.fixture
def filled(made, tmp_path):
    root = tmp_path / "store"
    shutil.copytree(made, root)
    config = Config.model_validate(settings(root))
    catalogue = Catalogue.open(config.need_store())
    yield StoreUnderTest(config, catalogue, root)
    catalogue.close()


def findings(store: StoreUnderTest, **options: object) -> list[Finding]:
    return fsck(store.config, store.catalogue, **options).findings


def one(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def row(store: StoreUnderTest, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(store.root / "catalogue.sqlite")) as record:
        assert record.execute(statement, values).rowcount >= 1
        record.commit()


def index(store: StoreUnderTest) -> Index:
    return opened(store.config.need_store())


def first(store: StoreUnderTest) -> str:
    return store.catalogue.list_series()[0].series_uid


def test_a_whole_store_has_no_finding_and_is_left_as_it_is(filled):
    before = everything(filled.root)
    report = fsck(filled.config, filled.catalogue, rate=1e12)
    assert (report.findings, report.young) == ([], 0)
    assert report.checked["received"] == 4  # two wait, one is held, and the journal
    assert report.checked["staged"] == 1
    assert report.checked["facets"] == 2  # one segment, and the index as a whole
    assert everything(filled.root) == before


def test_a_store_that_never_received_anything_gets_no_folder_by_it(filled):
    for name in ("receive", "staging", "facets"):
        shutil.rmtree(filled.root / name)
    assert findings(filled) == []
    assert not {"receive", "staging", "facets"} & {path.name for path in filled.root.iterdir()}


def damaged_codes(store: StoreUnderTest) -> None:
    """Write a code that the dictionary has not, with a hash that fits."""
    import hashlib

    folder = one(store.root / "facets" / "segments", "0*")
    meta = json.loads((folder / "meta.json").read_bytes())
    place = meta["arrays"]["modality.codes"]
    flat = np.array(Reader(folder).map("modality.codes", np.uint8))
    flat[0] = 200
    data = bytearray((folder / "data.bin").read_bytes())
    data[place["begin"] : place["begin"] + place["size"]] = flat.tobytes()
    (folder / "data.bin").write_bytes(data)
    place["sha256"] = hashlib.sha256(flat.tobytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


def ghost(store: StoreUnderTest) -> None:
    with store.catalogue.transaction() as connection:
        from kakehashi.store.catalogue import _SERIES

        uid = first(store)
        kept = store.catalogue.series(uid)
        connection.execute(_SERIES.delete().where(_SERIES.c.series_uid == uid))
    for path in (store.root / kept.path, (store.root / kept.path).with_suffix(".blocks")):
        path.unlink()


def old_part(store: StoreUnderTest) -> None:
    folder = store.root / "staging" / "1.2.3.part"
    folder.mkdir()
    long_ago = time.time() - 2 * STALE_S
    os.utime(folder, (long_ago, long_ago))


RECEIVED = "receive/inbox"
HELD = "receive/quarantine"
CASES: dict[str, tuple[Callable[[StoreUnderTest], object], str, str]] = {
    "a received object is gone": (
        lambda s: one(s.root / RECEIVED, "*.dcm").unlink(),
        "received-lost",
        "acknowledged",
    ),
    "a received object has a flipped bit": (
        lambda s: flip(one(s.root / RECEIVED, "*.dcm")),
        "received-damaged",
        "not the one",
    ),
    "a received object is cut": (
        lambda s: os.truncate(one(s.root / RECEIVED, "*.dcm"), 3000),
        "received-damaged",
        "not the one",
    ),
    "a received object is empty": (
        lambda s: os.truncate(one(s.root / RECEIVED, "*.dcm"), 0),
        "received-damaged",
        "does not begin",
    ),
    "a received object is a folder": (
        lambda s: (one(s.root / RECEIVED, "*.dcm").unlink(), (s.root / RECEIVED / "x.dcm").mkdir()),
        "received-damaged",
        "cannot be read",
    ),
    "the journal cannot be read": (
        lambda s: (
            shutil.rmtree(s.root / "receive/journal"),
            (s.root / "receive/journal/1.jsonl").mkdir(parents=True),
            (s.root / "receive/journal/.lock").touch(),
        ),
        "received-damaged",
        "cannot be read",
    ),
    "a file without a row": (
        lambda s: shutil.copy(one(s.root / RECEIVED, "*.dcm"), s.root / RECEIVED / "other.dcm"),
        "received-unknown",
        "no row",
    ),
    "a held object is gone": (
        lambda s: one(s.root / HELD, "*.dcm").unlink(),
        "quarantine",
        "its file is gone",
    ),
    "a held object says not why": (
        lambda s: one(s.root / HELD, "*.json").unlink(),
        "quarantine",
        "nothing says why",
    ),
    "a held object's reason is damaged": (
        lambda s: one(s.root / HELD, "*.json").write_text("{"),
        "quarantine",
        "damaged",
    ),
    "a held object has a flipped bit": (
        lambda s: flip(one(s.root / HELD, "*.dcm")),
        "received-damaged",
        "not the one",
    ),
    "a staged series has no origin": (
        lambda s: (s.root / "staging" / SERIES / "origin.json").unlink(),
        "staged",
        "nowhere",
    ),
    "a staged series has a damaged origin": (
        lambda s: (s.root / "staging" / SERIES / "origin.json").write_text("["),
        "staged",
        "cannot be read",
    ),
    "a staged series has another origin": (
        lambda s: (s.root / "staging" / SERIES / "origin.json").write_text('{"facility": 1}'),
        "staged",
        "are missing",
    ),
    "a staged object is no DICOM": (
        lambda s: one(s.root / "staging" / SERIES, "*.dcm").write_bytes(b"x" * 999),
        "staged",
        "not DICOM",
    ),
    "a stranger in staging": (
        lambda s: (s.root / "staging" / "notes.txt").write_text("x"),
        "staged",
        "not a series",
    ),
    "left over in staging": (old_part, "staged", "left over"),
    "the index has a flipped bit": (
        lambda s: flip(one(s.root / "facets", "segments/0*/data.bin"), 3),
        "facets",
        "not as it was written",
    ),
    "the index is cut": (
        lambda s: os.truncate(one(s.root / "facets", "segments/0*/data.bin"), 100),
        "facets",
        "100 bytes",
    ),
    "the index's small file is damaged": (
        lambda s: (s.root / "facets" / "index.json").write_text("{"),
        "facets",
        "cannot be read",
    ),
    "the index has a code too high": (damaged_codes, "facets", "not as it was written"),
    "the index lacks a series": (
        lambda s: index(s).withdraw([first(s)]),
        "facets-row",
        "has not got the series",
    ),
    "the index says something else": (
        lambda s: row(
            s, "UPDATE series SET body_part = 'elsewhere' WHERE series_uid = ?", first(s)
        ),
        "facets-row",
        "something else",
    ),
    "the index has a series too many": (ghost, "facets-row", "the catalogue has not"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_found_where_it_is_and_nothing_is_changed(filled, name):
    spoil, kind, what = CASES[name]
    spoil(filled)
    before = everything(filled.root)
    found = findings(filled)
    assert any(one.kind == kind and what in one.what for one in found), found
    for one_ in found:
        assert (filled.root / one_.path).parent.exists()
        assert one_.todo
    assert everything(filled.root) == before


def test_what_was_packed_just_now_may_be_in_no_index_yet(filled):
    index(filled).withdraw([first(filled)])
    row(filled, "INSERT INTO series_changes VALUES (?)", first(filled))
    report = fsck(filled.config, filled.catalogue)
    assert (report.findings, report.young) == ([], 1)


LONG_AGO = "UPDATE series SET added_at = '2020-01-01T00:00:00Z' WHERE series_uid = ?"


@pytest.mark.parametrize(
    ("level", "old", "expected"),
    [(True, True, []), (False, False, []), (False, True, ["facets-row"])],
)
def test_a_listed_change_excuses_only_where_the_index_will_follow_it(
    filled, monkeypatch, level, old, expected
):
    uid = first(filled)
    index(filled).withdraw([uid])
    row(filled, "INSERT INTO series_changes VALUES (?)", uid)
    if not level:
        index(filled).set_mark("of another catalogue")
    if old:
        row(filled, LONG_AGO, uid)
    # All of the list, read for each series, is quadratic.
    monkeypatch.setattr(Catalogue, "changes", None)
    for only in ((), (uid,)):
        report = fsck(filled.config, filled.catalogue, series=only)
        assert [one.kind for one in report.findings] == expected
        assert report.young == (not expected)


@pytest.mark.parametrize("lost", [False, True])
def test_what_comes_and_goes_while_the_inbox_is_listed_is_not_damage(filled, monkeypatch, lost):
    inbox = Inbox(filled.root)
    coming = [*files_of("pet_uneven"), *files_of("mr_adc")[3:]]
    names, number = fsckareas._names, count()

    def meanwhile(folder: Path) -> list[str]:
        """Take one object over, and receive another, just before the inbox is listed."""
        if folder == inbox.folders.inbox:
            inbox.discard(*[one for one in inbox.entries() if one.path.exists()][:1])
            assert send(inbox, coming[next(number)]) == "stored"
        return names(folder)

    expected = []
    if lost:
        victim = list(inbox.entries())[-1].path
        victim.unlink()
        expected = [("received-lost", f"{RECEIVED}/{victim.name}")]
    monkeypatch.setattr(fsckareas, "_names", meanwhile)
    assert [(one.kind, one.path) for one in findings(filled)] == expected
    assert next(number) >= 2  # it did change between journal and listing


def test_the_second_look_judges_only_what_the_first_one_found(filled):
    """An object that is lost between the looks was there in the first: the next check tells."""
    early, late = [entry.path for entry in Inbox(filled.root).entries()]
    early.unlink()
    early_found = f"{RECEIVED}/{early.name}"

    class Later:
        def at(self, stage: str, done: int, total: int | None, read: int) -> None:
            if stage == "facets":
                late.unlink(missing_ok=True)

    found = fsck(filled.config, filled.catalogue, progress=Later()).findings
    assert [one.path for one in found] == [early_found]
    assert len(findings(filled)) == 2


def test_a_run_that_is_stopped_goes_on_among_the_received(filled):
    class Stops:
        def at(self, stage: str, done: int, total: int | None, read: int) -> None:
            seen.append(stage)
            if stops and stage == "received" and seen.count("received") == 2:
                raise KeyboardInterrupt

    seen: list[str] = []
    stops = True
    with pytest.raises(KeyboardInterrupt):
        fsck(filled.config, filled.catalogue, progress=Stops())
    seen.clear()
    stops = False
    report = fsck(filled.config, filled.catalogue, progress=Stops())
    assert report.findings == []
    assert "series" not in seen
    assert report.checked["received"] == 4
