"""Inbox, journal, quarantine and figures, as the intake and a person use them."""

from __future__ import annotations

import datetime as dt
import errno
import fcntl
import hashlib
import itertools
import json
import os
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from kakehashi.errors import ConfigError, StoreError
from kakehashi.store.receive import Entry, ForeignPositionError, Inbox, journal
from kakehashi.store.receive import inbox as inbox_module
from kakehashi.store.receive.arrivals import Missing, arrivals, expect, read_list
from kakehashi.store.receive.entry import Receipt, read_receipt
from kakehashi.store.receive.journal import Journal
from kakehashi.store.receive.offer import Offer, Verdict
from kakehashi.store.receive.part import Part
from kakehashi.store.receive.quarantine import INTERRUPTED, Quarantine
from kakehashi.store.receive.settings import Receive, Sender

from .conftest import content
from .scu import CT, EXPLICIT, data_set

TODAY = dt.datetime.now(dt.UTC)


@pytest.fixture
def inbox(tmp_path) -> Inbox:
    return Inbox(tmp_path)


def offer(inbox: Inbox, sop: str, data: bytes | None = None, **changes: object) -> Offer:
    part = Part(inbox.folders.incoming / f"1-{sop.replace('.', '')}{os.urandom(4).hex()}.part")
    part.write(memoryview(data if data is not None else data_set(sop)))
    receipt = Receipt(TODAY, "east", "HOSP", "127.0.0.1", CT, sop, EXPLICIT, "", "", 0, "")
    return Offer(part.path.name, *part.seal(replace(receipt, **changes)))


def receive(inbox: Inbox, *sops: str, **changes: object) -> None:
    verdicts = inbox.admit([offer(inbox, sop, **changes) for sop in sops])
    assert verdicts == [Verdict.STORED] * len(sops)


def sops(inbox: Inbox, after: int = 0) -> list[str]:
    return [entry.sop for entry in inbox.entries(after)]


# --- entries ---


def test_entries_come_in_order_and_after_a_position(inbox):
    receive(inbox, "1.2.1", "1.2.2")
    first, second = inbox.entries()
    receive(inbox, "1.2.3")
    assert sops(inbox, after=first.position) == ["1.2.2", "1.2.3"]
    assert sops(inbox, after=second.position) == ["1.2.3"]
    assert first.position < second.position
    # Another process sees the same.
    assert list(Inbox(inbox.folders.root).entries()) == list(inbox.entries())


def test_a_position_of_another_journal_is_refused(inbox):
    receive(inbox, "1.2.1")
    with pytest.raises(ForeignPositionError, match="another journal"):
        list(inbox.entries(after=10**6))


def test_what_was_taken_over_is_gone(inbox):
    receive(inbox, "1.2.1", "1.2.2", "1.2.3")
    one, two, three = inbox.entries()
    inbox.discard(one, three)
    inbox.discard(one)
    assert sops(inbox) == ["1.2.2"]
    assert [path.name for path in inbox.folders.inbox.iterdir()] == [two.path.name]


def test_an_old_entry_does_not_take_a_new_object_of_its_name(inbox):
    receive(inbox, "1.2.1")
    (old,) = inbox.entries()
    inbox.discard(old)
    assert inbox.admit([offer(inbox, "1.2.1", data_set("1.2.1", pixels=b"new"))]) == ["stored"]
    inbox.discard(old)
    with pytest.raises(StoreError, match="not in the inbox"):
        inbox.quarantine(old, "late")
    (new,) = inbox.entries()
    assert content(new).endswith(b"new\0")


def test_a_discard_that_was_interrupted_is_finished(inbox):
    receive(inbox, "1.2.1", "1.2.2")
    one, two = inbox.entries()
    kept = one.path.read_bytes(), two.path.read_bytes()
    inbox.discard(one, two)
    # The first is as it was; under the name of the second there is one that came later, and
    # whose row was lost: that is not what was taken over.
    one.path.write_bytes(kept[0])
    receive(inbox, "1.2.2", calling="OTHER")
    for file in inbox.folders.journal.glob("*.jsonl"):
        *rows, _ = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(rows))
    inbox.recover()
    (entry,) = inbox.entries()
    assert (entry.sop, entry.calling) == ("1.2.2", "OTHER")
    assert [path.name for path in inbox.folders.inbox.iterdir()] == [two.path.name]


def test_a_file_says_itself_what_it_is(inbox):
    receive(inbox, "1.2.1", facility="東京病院 " * 8)
    (entry,) = inbox.entries()
    assert read_receipt(entry.path).as_json() == entry.as_json()
    meta = dcmread(entry.path).file_meta
    assert meta.MediaStorageSOPInstanceUID == "1.2.1"
    assert meta.TransferSyntaxUID == EXPLICIT
    assert meta.SourceApplicationEntityTitle == "HOSP"


# --- the journal ---


def test_the_journal_rotates_and_is_trimmed(inbox, monkeypatch):
    monkeypatch.setattr(journal, "ROTATE", 2000)
    other = Inbox(inbox.folders.root)
    for number in range(40):
        receive(inbox if number % 2 else other, f"1.2.{number}")
    files = sorted(inbox.folders.journal.glob("*.jsonl"))
    assert len(files) > 5
    entries = list(inbox.entries())
    assert [entry.sop for entry in entries] == [f"1.2.{n}" for n in range(40)]
    for entry in entries:
        assert sops(inbox, after=entry.position) == [
            later.sop for later in entries if later.position > entry.position
        ]

    # The third stays, and so its file of the journal does.
    inbox.discard(*entries[:2], *entries[3:20])
    inbox.trim(entries[19].position)
    left = sorted(inbox.folders.journal.glob("*.jsonl"))
    assert files[0] in left
    assert len(left) < len(files)
    assert sops(inbox) == [f"1.2.{n}" for n in (2, *range(20, 40))]
    inbox.discard(entries[2])
    inbox.trim(entries[19].position)
    assert files[0] not in set(inbox.folders.journal.glob("*.jsonl"))
    inbox.recover()
    assert sops(inbox) == [f"1.2.{n}" for n in range(20, 40)]
    (today,) = arrivals(inbox, 1)
    assert today.received == 40


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers(), max_size=4),
        min_size=1,
        max_size=8,
    ),
    damage=st.binary(max_size=30),
)
def test_a_torn_end_harms_no_row(tmp_path_factory, rows, damage):
    folder = tmp_path_factory.mktemp("journal")
    book = Journal(folder)
    with book.held():
        positions = book.append(rows)
    wanted = list(zip(positions, rows, strict=True))
    assert list(book.rows()) == wanted
    (file,) = folder.glob("*.jsonl")
    with file.open("ab") as handle:
        handle.write(damage.replace(b"\n", b""))
    assert list(book.rows()) == wanted
    # A writer that never saw it go wrong, and one that mends first.
    with book.held():
        more = book.append([{"kind": "more"}])
    assert list(book.rows())[len(rows) :] == [(more[0], {"kind": "more"})]
    with file.open("ab") as handle:
        handle.write(b"half a line")
    with book.held():
        book.mend()
    assert file.read_bytes().endswith(b"\n")
    assert list(book.rows(after=more[0])) == []


def test_a_damaged_row_is_written_anew_from_its_file(inbox):
    receive(inbox, "1.2.1", "1.2.2")
    (file,) = inbox.folders.journal.glob("*.jsonl")
    raw = bytearray(file.read_bytes())
    raw[60] ^= 1
    file.write_bytes(raw)
    assert sops(inbox) == ["1.2.2"]
    inbox.recover()
    assert sops(inbox) == ["1.2.2", "1.2.1"]
    file.unlink()
    anew = Inbox(inbox.folders.root)
    anew.recover()
    assert sorted(sops(anew)) == ["1.2.1", "1.2.2"]


def test_a_lost_file_is_said_and_no_longer_offered(inbox, caplog):
    receive(inbox, "1.2.1", "1.2.2")
    first, _ = inbox.entries()
    first.path.unlink()
    inbox.recover()
    assert sops(inbox) == ["1.2.2"]
    assert f"{first.path.name} stands in the journal, and is gone" in caplog.text


def test_a_file_that_changed_without_a_row_is_held(inbox):
    receive(inbox, "1.2.1")
    (entry,) = inbox.entries()
    raw = bytearray(entry.path.read_bytes())
    raw[-1] ^= 1
    entry.path.write_bytes(raw)
    for file in inbox.folders.journal.glob("*.jsonl"):
        file.unlink()
    anew = Inbox(inbox.folders.root)
    anew.recover()
    assert sops(anew) == []
    (held,) = anew.held.list()
    assert "not what its own header says" in held.reason


# --- quarantine ---


def test_held_by_the_intake_released_and_held_again(inbox):
    receive(inbox, "1.2.1", "1.2.2")
    one, _ = inbox.entries()
    inbox.quarantine(one, "burned-in text")
    assert sops(inbox) == ["1.2.2"]
    (held,) = inbox.held.list()
    assert (held.reason, held.receipt.sop) == ("burned-in text", "1.2.1")
    inbox.release(held.id)
    assert inbox.held.list() == []
    assert list(inbox.folders.quarantine.iterdir()) == []
    new = list(inbox.entries())[-1]
    assert (new.sop, content(new)) == ("1.2.1", data_set("1.2.1"))
    assert new.position > one.position
    inbox.recover()
    assert sorted(sops(inbox)) == ["1.2.1", "1.2.2"]


def test_a_place_that_is_taken_is_not_released_into(inbox):
    receive(inbox, "1.2.1")
    assert inbox.admit([offer(inbox, "1.2.1", data_set("1.2.1", pixels=b"x"))]) == ["held"]
    (held,) = inbox.held.list()
    with pytest.raises(StoreError, match="waits in the inbox"):
        inbox.release(held.id)
    inbox.discard(*inbox.entries())
    inbox.release(held.id)
    (entry,) = inbox.entries()
    assert content(entry) == data_set("1.2.1", pixels=b"x")


def test_discarding_for_good(inbox):
    inbox.admit([offer(inbox, "1.2.1", b"rubbish")])
    (held,) = inbox.held.list()
    inbox.discard_held(held.id)
    assert list(inbox.folders.quarantine.iterdir()) == []
    for unknown in (held.id, "../../x", "", "0" * 12 + "-" + "0" * 12):
        with pytest.raises(StoreError, match="nothing in quarantine"):
            inbox.discard_held(unknown)


def test_what_a_run_left_half_done_in_quarantine_is_finished(inbox):
    inbox.admit([offer(inbox, "1.2.1", b"rubbish"), offer(inbox, "1.2.2", b"rubbish")])
    first, second = inbox.held.list()
    first.path.with_suffix(".json").unlink()
    second.path.unlink()
    (inbox.folders.quarantine / "x.json.part").write_bytes(b"{")
    inbox.recover()
    (held,) = inbox.held.list()
    assert (held.id, held.reason) == (first.id, INTERRUPTED)


def test_a_receipt_that_is_none_is_refused():
    good = Receipt(TODAY, "e", "H", "1", CT, "1.2", EXPLICIT, "", "", 1, "").as_json()
    assert Receipt.from_json(good).as_json() == good
    for change in ({"size": "1"}, {"sop": 1}, {"received_at": "yesterday"}, {"facility": None}):
        with pytest.raises(StoreError):
            Receipt.from_json(good | change)


# --- figures ---


def test_expected_against_received(inbox, tmp_path):
    yesterday = TODAY - dt.timedelta(days=1)
    day = TODAY.astimezone().date()
    for number in range(5):
        receive(inbox, f"1.2.{number}")
    inbox.admit([offer(inbox, "1.2.0")])
    other = data_set("1.2.9", study="1.2.3.2")
    inbox.admit([offer(inbox, "1.2.9", other, received_at=yesterday)])
    inbox.admit([offer(inbox, "1.3.1", b"rubbish"), offer(inbox, "1.3.1", b"rubbish")])
    receive(inbox, "1.4.1", facility="west")
    table = tmp_path / "list.csv"
    table.write_text(
        f"date,study_uid,instances\n{day},1.2.3.1,7\n{day:%Y%m%d},1.2.3.2,1\n{day},1.2.3.3,2\n"
    )
    assert expect(inbox.folders.expected, "east", read_list(table)) == 3
    east, west, before = arrivals(inbox, 2)
    assert (east.facility, east.expected_studies, east.expected) == ("east", 3, 10)
    # The same object twice counts once, also where it was taken over in between.
    inbox.discard(*inbox.entries())
    assert inbox.admit([offer(inbox, "1.2.1")]) == ["stored"]
    east, west, before = arrivals(inbox, 2)
    assert (east.received, east.received_studies, east.again) == (5, 1, 3)
    assert east.quarantined == 1
    assert east.bytes == sum(len(data_set(f"1.2.{n}")) for n in range(5))
    assert east.missing == (Missing("1.2.3.1", 7, 5), Missing("1.2.3.3", 2, 0))
    assert (west.facility, west.expected, west.received, west.missing) == ("west", 0, 1, ())
    assert (before.date, before.received) == (yesterday.astimezone().date(), 1)
    # What is released has come after all; nothing is counted twice.
    inbox.release(inbox.held.list()[0].id)
    assert (arrivals(inbox, 1)[0].received, arrivals(inbox, 1)[0].quarantined) == (6, 0)
    # A later list corrects the earlier.
    table.write_text(f"date,study_uid,instances\n{day},1.2.3.1,5\n{day},1.2.3.3,0\n")
    with pytest.raises(StoreError, match="line 3"):
        expect(inbox.folders.expected, "east", read_list(table))
    table.write_text(f"date,study_uid,instances\n{day},1.2.3.1,5\n")
    expect(inbox.folders.expected, "east", read_list(table))
    assert [one.study for one in arrivals(inbox, 1)[0].missing] == ["1.2.3.3"]


def test_figures_survive_an_interrupted_count(inbox):
    receive(inbox, "1.2.1", "1.2.2")
    inbox.figures.update(inbox.journal)
    # As if the run had ended before it noted how far it came.
    (inbox.folders.figures / "counted").write_text("0\n")
    receive(inbox, "1.2.3")
    assert arrivals(inbox, 1)[0].received == 3
    assert arrivals(inbox, 1)[0].again == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("date,study_uid\n", "lacks the column.*instances"),
        ("date,study_uid,instances\n2026-13-01,1.2,1\n", "line 2"),
        ("date,study_uid,instances\n2026-01-01,abc,1\n", "line 2.*StudyInstanceUID"),
        ("date,study_uid,instances\n2026-01-01,1.2,many\n", "line 2"),
        ("date,study_uid,instances\n2026-01-01,1.2\n", "line 2"),
    ],
)
def test_a_wrong_list_is_refused_whole(inbox, tmp_path, text, why):
    table = tmp_path / "list.csv"
    table.write_text(text)
    with pytest.raises(StoreError, match=why):
        expect(inbox.folders.expected, "east", read_list(table))
    assert list(inbox.folders.expected.glob("*.json")) == []


# --- settings ---


def test_settings_that_cannot_be_are_refused():
    east = Sender(facility="east", ae_titles=["A", "B"], addresses=["10.0.0.0/8"])
    for wrong in (
        {"tls_key": "/k"},
        {"tls_client_ca": "/ca"},
        {"ae_title": "MUCH TOO LONG A TITLE"},
        {"ae_title": "BACK\\SLASH"},
        {"senders": [east, Sender(facility="w", ae_titles=["B"], addresses=["10.1.0.0/16"])]},
        {"senders": [{"facility": "e", "ae_titles": ["A"], "addresses": ["10.0.0.1/8"]}]},
        {"senders": [{"facility": "e", "ae_titles": [], "addresses": ["10.0.0.1"]}]},
        {"unknown": 1},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            Receive.model_validate(wrong)
    Receive(senders=[east, Sender(facility="w", ae_titles=["B"], addresses=["11.0.0.0/8"])])


# --- the commands ---


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    import typer
    from typer.testing import CliRunner

    from kakehashi.cli import receive as cli

    config = tmp_path / "kakehashi.toml"
    config.write_text(
        f"""
        [store]
        root = "{tmp_path}"
        address = "store.example"

        [[store.receive.senders]]
        facility = "east"
        ae_titles = ["HOSP"]
        addresses = ["127.0.0.1"]
        """
    )
    monkeypatch.setenv("KAKEHASHI_CONFIG", str(config))
    became: list[str] = []
    # There would be no way back for this process.
    monkeypatch.setattr("kakehashi.store.authority.accounts.become", became.append)
    app = typer.Typer()
    app.command("receive")(cli.receive)
    app.command("expect")(cli.expect)
    app.command("arrivals")(cli.arrivals)
    app.add_typer(cli.quarantine, name="quarantine")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        if done.exception is not None:
            raise done.exception
        assert became.pop() == "kakehashi-receive"
        return done.stdout

    return run


def test_quarantine_on_the_command_line(inbox, command):
    inbox.admit([offer(inbox, "1.2.1", b"rubbish"), offer(inbox, "1.2.2", b"rubbish")])
    first, second = inbox.held.list()
    table = command("quarantine")
    assert first.id in table
    assert "ends before a SeriesInstanceUID" in table
    assert [one["id"] for one in json.loads(command("quarantine", "list", "--json"))] == [
        first.id,
        second.id,
    ]
    shown = json.loads(command("quarantine", "show", first.id, "--json"))
    assert shown["sha256"] == hashlib.sha256(b"rubbish").hexdigest()
    assert shown["path"] == str(first.path)
    assert "HOSP" in command("quarantine", "show", first.id)
    command("quarantine", "release", first.id)
    command("quarantine", "discard", second.id)
    assert json.loads(command("quarantine", "list", "--json")) == []
    assert sops(inbox) == [first.receipt.sop]


def test_arrivals_on_the_command_line(inbox, command, tmp_path):
    receive(inbox, "1.2.1")
    table = tmp_path / "list.csv"
    day = TODAY.astimezone().date()
    table.write_text(f"date,study_uid,instances\n{day},1.2.3.1,2\n")
    assert "1 studies" in command("expect", "east", str(table))
    shown = command("arrivals")
    assert "1.2.3.1: 1 of 2" in shown
    (row,) = json.loads(command("arrivals", "--json", "--days", "1"))
    assert row["missing"] == [{"study": "1.2.3.1", "expected": 2, "received": 1}]
    with pytest.raises(ConfigError, match="'nowhere'"):
        command("expect", "nowhere", str(table))


def test_an_entry_is_what_was_promised():
    assert set(Entry.__dataclass_fields__) == {
        "position",
        "received_at",
        "facility",
        "calling",
        "address",
        "sop_class",
        "sop",
        "transfer_syntax",
        "study",
        "series",
        "size",
        "sha256",
        "path",
    }


def test_a_writer_that_slept_while_files_were_dropped_writes_where_readers_look(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(journal, "ROTATE", 200)
    sleeper, busy = journal.Journal(tmp_path), journal.Journal(tmp_path)
    with sleeper.held():
        sleeper.append([{"kind": "again", "number": number} for number in range(10)])
    positions = []
    for number in range(20):
        with busy.held():
            positions += busy.append([{"kind": "again", "number": number}] * 3)
    busy.drop(positions[-1], set())
    assert len(list(tmp_path.glob("*"))) == 2  # the newest file, and the lock
    with sleeper.held():
        (mine,) = sleeper.append([{"kind": "in", "number": 99}])
    assert mine > positions[-1]
    assert [row["number"] for _, row in busy.rows(positions[-1])] == [99]


# --- a large backlog, and a journal that is another one ---


def parsed(monkeypatch) -> list[bytes]:
    """Lines of the journal that were read for their values from here on."""
    lines: list[bytes] = []
    original = json.loads

    def loads(text, *arguments, **keywords):
        lines.append(text)
        return original(text, *arguments, **keywords)

    monkeypatch.setattr(journal.json, "loads", loads)
    return lines


def test_a_large_backlog_is_read_in_batches_and_a_few_times_in_all(inbox, monkeypatch):
    count = 300
    receive(inbox, *(f"1.2.{number}" for number in range(count)))
    inbox = Inbox(inbox.folders.root)
    lines, position, found = parsed(monkeypatch), 0, []
    while batch := list(itertools.islice(inbox.entries(position), 10)):
        inbox.discard(*batch)
        position = batch[-1].position
        found += [entry.sop for entry in batch]
        if len(found) == 10:
            # The first batch does not wait for the rest to be read.
            assert len(lines) == 2 * len(batch)
    for _ in range(20):
        # Nor does who waits read again and again what was dealt with.
        assert list(inbox.entries(position)) == []
    # Row, header of the file, and twice the mark.
    assert len(lines) <= 4 * count + 20
    assert found == [f"1.2.{number}" for number in range(count)]


def test_what_is_gone_is_known_wherever_one_begins(inbox):
    receive(inbox, *(f"1.2.{number}" for number in range(6)))
    entries = list(inbox.entries())
    assert sops(inbox, entries[3].position) == ["1.2.4", "1.2.5"]
    other = Inbox(inbox.folders.root)
    other.discard(entries[4], entries[1])
    assert sops(inbox, entries[3].position) == ["1.2.5"]
    assert sops(inbox) == ["1.2.0", "1.2.2", "1.2.3", "1.2.5"]
    other.discard(entries[0])
    assert sops(inbox, entries[1].position) == ["1.2.2", "1.2.3", "1.2.5"]
    assert sops(inbox) == ["1.2.2", "1.2.3", "1.2.5"]


def test_while_the_journal_is_read_objects_get_their_places(inbox, monkeypatch):
    """Trimming reads all of it; a receiver must not wait for that."""
    monkeypatch.setattr(journal, "ROTATE", 2000)
    receive(inbox, *(f"1.2.{number}" for number in range(20)))
    for number in range(20, 30):
        receive(inbox, f"1.2.{number}")
    entries = list(inbox.entries())
    inbox.discard(*entries[:25])
    other = Inbox(inbox.folders.root)
    arriving = iter([offer(inbox, f"1.3.{number}") for number in range(5)])
    inbox.figures.update(inbox.journal)
    original = journal.json.loads

    def loads(*arguments, **keywords):
        if (one := next(arriving, None)) is not None:
            lock = os.open(inbox.folders.journal / ".lock", os.O_RDWR)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(lock)
            assert other.admit([one]) == [Verdict.STORED]
        return original(*arguments, **keywords)

    monkeypatch.setattr(journal.json, "loads", loads)
    inbox.trim(entries[24].position)
    monkeypatch.undo()
    assert next(arriving, None) is None
    assert sops(inbox) == [f"1.2.{n}" for n in range(25, 30)] + [f"1.3.{n}" for n in range(5)]


@pytest.mark.parametrize("grown", [0, 200])
def test_a_position_of_a_lost_journal_is_known_as_that(inbox, grown):
    """However far the new journal has grown: else all before the position would be passed over."""
    receive(inbox, "1.2.1", "1.2.2")
    first, second = inbox.entries()
    inbox.discard(first)
    arrivals(inbox, 1)
    for file in inbox.folders.journal.glob("*.jsonl"):
        file.unlink()
    inbox = Inbox(inbox.folders.root)
    inbox.recover()
    if grown:
        receive(inbox, *(f"1.3.{number}" for number in range(grown)))
    with pytest.raises(ForeignPositionError, match="another journal"):
        list(inbox.entries(after=second.position))
    assert sops(inbox) == ["1.2.2", *(f"1.3.{number}" for number in range(grown))]
    (today,) = arrivals(inbox, 1)
    assert today.received == 2 + grown


def test_a_journal_of_an_older_release_goes_on(inbox, monkeypatch):
    """Its positions began at 0."""
    receive(inbox, "1.2.1", "1.2.2")
    (file,) = inbox.folders.journal.glob("*.jsonl")
    file.rename(file.with_name(f"{0:020}.jsonl"))
    inbox = Inbox(inbox.folders.root)
    first, second = inbox.entries()
    monkeypatch.setattr(journal, "ROTATE", 100)
    receive(inbox, "1.2.3")
    assert sops(inbox, second.position) == ["1.2.3"]
    inbox.discard(first, second)
    inbox.trim(second.position)
    assert sops(inbox, second.position) == ["1.2.3"]
    with pytest.raises(ForeignPositionError):
        list(inbox.entries(second.position + 1))


# --- what was interrupted is mended beside a running receiver ---


@pytest.mark.parametrize("step", ["sync_folder", "_note", "forget"])
def test_a_release_that_was_interrupted_is_finished_by_the_next_command(
    inbox, command, monkeypatch, step
):
    inbox.admit([offer(inbox, "1.2.1", b"rubbish"), offer(inbox, "1.2.2", b"rubbish")])
    first, second = inbox.held.list()
    (inbox.folders.incoming / "9-9.part").write_bytes(b"still arrives")

    class Killed(BaseException):
        pass

    def dies(*_):
        raise Killed

    owner = {"sync_folder": inbox_module, "_note": Inbox, "forget": Quarantine}[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, dies)
        with pytest.raises(Killed):
            inbox.release(first.id)
    assert [one["id"] for one in json.loads(command("quarantine", "list", "--json"))] == [second.id]
    assert sops(inbox) == ["1.2.1"]
    assert len(list(inbox.folders.inbox.iterdir())) == 1
    # What arrives is the receiver's, and goes on.
    assert len(list(inbox.folders.incoming.iterdir())) == 1


def test_an_object_held_without_its_reason_is_listed_by_the_next_command(inbox, command):
    inbox.admit([offer(inbox, "1.2.1", b"rubbish")])
    (held,) = inbox.held.list()
    held.path.with_suffix(".json").unlink()
    (listed,) = json.loads(command("quarantine", "list", "--json"))
    assert (listed["id"], listed["reason"]) == (held.id, INTERRUPTED)


# --- the name and the row wait for the disk together ---


def test_a_row_whose_name_the_power_cut_took_gets_its_object_back(inbox):
    """The row may be on the disk and the name not: the object still has the one it came under."""
    receive(inbox, "1.2.1", "1.2.2")
    first, second = inbox.entries()
    first.path.rename(inbox.folders.incoming / "7-1.part")
    second.path.unlink()
    arriving = offer(inbox, "1.2.3")
    (inbox.folders.incoming / "7-2.part").write_bytes(b"half")
    assert (inbox.folders.incoming / arriving.part).exists()
    inbox.recover()
    assert sops(inbox) == ["1.2.1"]
    assert content(next(inbox.entries())) == data_set("1.2.1")
    assert list(inbox.folders.incoming.iterdir()) == []


@pytest.mark.parametrize("where", ["folder", "journal"])
def test_where_either_fails_neither_stands(inbox, monkeypatch, where):
    receive(inbox, "1.2.1")
    offers = [offer(inbox, "1.2.2"), offer(inbox, "1.2.3")]

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        if where == "folder":
            patch.setattr(inbox_module, "sync_folder", fails)
        else:
            patch.setattr(journal.os, "fdatasync", fails)
        assert inbox.admit(offers) == [Verdict.FAILED] * 2
    assert sops(inbox) == ["1.2.1"]
    assert len(list(inbox.folders.inbox.iterdir())) == 1
    receive(inbox, "1.2.2")
    assert sops(inbox) == ["1.2.1", "1.2.2"]


def test_the_name_and_the_row_are_on_the_disk_before_the_answer(inbox, monkeypatch):
    """And they wait for it at the same time: each is begun before either is done."""
    both = threading.Barrier(2)
    done = []

    def synced(original):
        def sync(*arguments):
            both.wait(timeout=20)
            original(*arguments)
            done.append(original)

        return sync

    offers = [offer(inbox, "1.2.1")]
    monkeypatch.setattr(inbox_module, "sync_folder", synced(inbox_module.sync_folder))
    monkeypatch.setattr(journal.os, "fdatasync", synced(os.fdatasync))
    assert inbox.admit(offers) == [Verdict.STORED]
    assert len(done) == 2
