"""The audit trail: whole when untouched, and every tampering found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kakehashi.audit import Anchors, Audit, Head, Record, canonical, read_anchors, verify
from kakehashi.audit.canonical import utc
from kakehashi.audit.trail import MAX_LINE
from kakehashi.errors import AuditError

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

NOW = 1_800_000_000.0
KEY = Ed25519PrivateKey.generate()
LINES = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Head]:
    """A sound trail of some lines, and its signed head."""
    audit = Audit(tmp_path_factory.mktemp("audit") / "audit.jsonl", lambda: NOW)
    for number in range(LINES):
        audit.append(
            "step",
            session="ab" * 16 if number % 2 else None,
            person="太郎",
            detail={"number": number, "text": "line\nbreak", "nested": {"b": [1, None], "a": 1.5}},
        )
    head = Head.sign(audit, KEY, NOW)
    assert verify(audit.path, [head]).ok
    return audit.path.read_bytes(), head


def check(data: bytes, tmp_path: Path, *heads: Head) -> list[int | None]:
    path = tmp_path / "changed.jsonl"
    path.write_bytes(data)
    return [problem.line for problem in verify(path, heads).problems]


def split(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


anywhere = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


def test_untouched_trail_verifies(whole: tuple[bytes, Head], tmp_path: Path) -> None:
    data, head = whole
    assert check(data, tmp_path, head) == []
    assert check(b"", tmp_path) == []
    verdict = verify(tmp_path / "missing.jsonl")
    assert verdict.ok
    assert verdict.lines == 0


@anywhere
@given(data=st.data())
def test_any_changed_byte_is_found_at_its_line(
    whole: tuple[bytes, Head], tmp_path: Path, data: st.DataObject
) -> None:
    trail = bytearray(whole[0])
    place = data.draw(st.integers(0, len(trail) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda value: value != trail[place]))
    line = trail[:place].count(b"\n") + 1
    trail[place] = new
    assert line in check(bytes(trail), tmp_path)


@anywhere
@given(st.integers(0, LINES - 2))
def test_dropped_line_is_found(whole: tuple[bytes, Head], tmp_path: Path, number: int) -> None:
    lines = split(whole[0])
    del lines[number]
    assert check(b"".join(lines), tmp_path) == [number + 1]
    (problem,) = verify(tmp_path / "changed.jsonl").problems
    assert "1 record(s) before it were dropped" in problem.message


@anywhere
@given(st.permutations(range(LINES)).filter(lambda order: list(order) != sorted(order)))
def test_other_order_is_found(whole: tuple[bytes, Head], tmp_path: Path, order: list[int]) -> None:
    lines = split(whole[0])
    first_moved = next(i for i, number in enumerate(order) if i != number)
    found = check(b"".join(lines[i] for i in order), tmp_path, whole[1])
    assert found[0] == first_moved + 1


@anywhere
@given(st.integers(0, LINES - 1))
def test_repeated_line_is_found(whole: tuple[bytes, Head], tmp_path: Path, number: int) -> None:
    lines = split(whole[0])
    lines.insert(number, lines[number])
    assert number + 2 in check(b"".join(lines), tmp_path)


@anywhere
@given(st.integers(0, LINES - 1))
def test_truncation_is_found_through_the_anchor(
    whole: tuple[bytes, Head], tmp_path: Path, kept: int
) -> None:
    data, head = whole
    short = b"".join(split(data)[:kept])
    # The control: without an anchor a shortened trail looks whole.
    assert check(short, tmp_path) == []
    assert check(short, tmp_path, head) == [kept + 1]


def test_torn_line_is_found(whole: tuple[bytes, Head], tmp_path: Path) -> None:
    assert check(whole[0][:-5], tmp_path) == [LINES]


def test_rewritten_trail_is_found_through_the_anchor(
    whole: tuple[bytes, Head], tmp_path: Path
) -> None:
    # Whoever has the store's root can make a new chain, but not new heads of last year's date.
    forged = Audit(tmp_path / "forged.jsonl", lambda: NOW)
    for number in range(LINES):
        forged.append("step", detail={"number": number})
    assert verify(forged.path).ok
    (problem,) = verify(forged.path, [whole[1]]).problems
    assert problem.line == LINES
    assert "rewritten" in problem.message


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b'"kind":"step"', b'"kind": "step"'),
        lambda line: b'{"kind":"other",' + line[1:],
        lambda line: line.replace(b'"number":3', b'"number":3.0'),
        lambda line: json.dumps(json.loads(line)).encode() + b"\n",
        lambda line: line.replace("太郎".encode(), b"\\u592a\\u90ce"),
    ],
)
def test_same_values_in_another_spelling_are_found(
    whole: tuple[bytes, Head], tmp_path: Path, change: Any
) -> None:
    lines = split(whole[0])
    changed = change(lines[3])
    assert changed != lines[3]
    lines[3] = changed
    assert check(b"".join(lines), tmp_path) == [4]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)  # fmt: skip


@anywhere
@given(detail=st.dictionaries(st.text(max_size=8), json_values, max_size=5), person=st.text())
def test_whatever_is_recorded_reads_back(
    tmp_path: Path, detail: dict[str, Any], person: str
) -> None:
    audit = Audit(tmp_path / "any.jsonl", lambda: NOW)
    audit.path.unlink(missing_ok=True)
    try:
        written = audit.append("step", person=person, detail=detail)
    except AuditError:
        # A lone surrogate cannot be written, and then nothing was.
        assert list(audit.records()) == []
        return
    assert list(audit.records()) == [written]
    assert written.detail == json.loads(json.dumps(detail))
    assert verify(audit.path).ok


def test_what_cannot_be_recorded_leaves_the_trail_as_it_was(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.append("first")
    before = audit.path.read_bytes()
    for detail in ({"x": b"bytes"}, {"x": float("nan")}, {"x": "y" * MAX_LINE}, {"x": "\ud800"}):
        with pytest.raises(AuditError):
            audit.append("second", detail=detail)
    assert audit.path.read_bytes() == before


def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.append("first")
    assert stat.S_IMODE(audit.path.stat().st_mode) == 0o600


def test_line_that_was_exchanged_for_a_sound_one_is_found(
    whole: tuple[bytes, Head], tmp_path: Path
) -> None:
    lines = split(whole[0])
    record = Record.parse(lines[4][:-1])
    draft = dataclasses.replace(record, person="次郎")
    digest = hashlib.sha256(canonical(draft.unhashed())).hexdigest()
    lines[4] = dataclasses.replace(draft, hash=digest).line() + b"\n"
    assert check(lines[4], tmp_path) == [1]
    # The exchanged line is sound in itself; the one after it tells.
    assert check(b"".join(lines), tmp_path) == [6]


def _write_many(path: Path, number: int, gate: Barrier | None = None) -> None:
    audit = Audit(path)
    if gate:
        gate.wait()
    for step in range(number):
        audit.append("step", detail={"pid": os.getpid(), "step": step})


def test_many_processes_append_to_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(4)
    writers = [context.Process(target=_write_many, args=(path, 100, gate)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    verdict = verify(path)
    assert verdict.ok
    assert verdict.lines == 400


def test_trail_survives_kill_9_of_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("spawn")
    for _ in range(3):
        before = path.stat().st_size if path.exists() else 0
        writer = context.Process(target=_write_many, args=(path, 10**6))
        writer.start()
        while not path.exists() or path.stat().st_size < before + 5000:
            assert writer.is_alive()
        assert writer.pid
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        Audit(path).append("after")
    assert verify(path).ok


def test_torn_last_line_is_repaired_and_told(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.append("first")
    with audit.path.open("ab") as file:
        file.write(b'{"seq":2,"ki')
    audit.append("second")
    assert [record.kind for record in audit.records()] == ["first", "audit.repaired", "second"]
    assert verify(audit.path).ok


def test_nothing_is_appended_to_a_trail_with_a_bad_end(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.append("first")
    audit.path.write_bytes(audit.path.read_bytes().replace(b"first", b"other"))
    with pytest.raises(AuditError, match="last line"):
        audit.append("second")


# Anchors


def test_anchor_is_written_once_a_head(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    paths = [tmp_path / "one", tmp_path / "two"]
    anchors = Anchors(audit, paths, KEY, lambda: NOW)
    for _ in range(3):
        audit.append("step")
        anchors.write()
        anchors.write()
    for path in paths:
        heads = read_anchors(path, KEY.public_key())
        assert [head.seq for head in heads] == [1, 2, 3]
        assert verify(audit.path, heads).anchored == 3


def test_anchor_out_of_reach_is_recorded_once_and_caught_up(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    away = tmp_path / "away"
    anchors = Anchors(audit, [away / "anchor", tmp_path / "near"], KEY, lambda: NOW)
    for _ in range(3):
        audit.append("step")
        anchors.write()
    kinds = [record.kind for record in audit.records()]
    assert kinds.count("anchor.failed") == 1
    away.mkdir()
    anchors.write()
    (head,) = read_anchors(away / "anchor", KEY.public_key())
    assert head.seq == len(kinds)


def test_forged_heads_are_refused(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.append("step")
    Anchors(audit, [tmp_path / "anchor"], KEY, lambda: NOW).write()
    line = (tmp_path / "anchor").read_bytes()
    assert read_anchors(tmp_path / "anchor", KEY.public_key())
    for forged in (
        line.replace(b'"seq":1', b'"seq":0'),
        line.replace(b"2027", b"2028"),
        b"{}\n",
        b"[]\n",
        b"no JSON\n",
    ):
        assert forged != line
        (tmp_path / "anchor").write_bytes(forged)
        with pytest.raises(AuditError, match="line 1"):
            read_anchors(tmp_path / "anchor", KEY.public_key())
    (tmp_path / "anchor").write_bytes(line)
    with pytest.raises(AuditError, match="signature"):
        read_anchors(tmp_path / "anchor", Ed25519PrivateKey.generate().public_key())


def test_times_are_utc_with_z() -> None:
    assert utc(NOW) == "2027-01-15T08:00:00Z"
    assert utc(NOW + 0.25) == "2027-01-15T08:00:00.250Z"
